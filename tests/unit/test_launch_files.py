"""What stands in `launch/` for schedulers: read as they read it, and held against our own command line."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lumina.cli import _parser
from lumina.config.load import load_config
from lumina.launch.hostfile import Host, read_hostfile

ROOT = Path(__file__).parents[2]
SBATCH, JOB, HOSTFILE = (ROOT / "launch" / name for name in ("slurm.sbatch", "kubernetes.yaml", "hostfile.example"))
GUIDE = ROOT / "docs" / "launch.md"


def accepted(words: list[str], monkeypatch) -> dict:
    """Arguments of `lumina launch` as our parser reads them; their configuration is one that loads."""
    monkeypatch.chdir(ROOT)
    arguments = _parser().parse_args(["launch", *words])
    load_config(arguments.config, arguments.overrides)
    return vars(arguments)


def shellcheck() -> str | None:
    return shutil.which("shellcheck", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))


@pytest.mark.parametrize("path", [*sorted((ROOT / "launch").glob("*.sh")), SBATCH], ids=lambda path: path.name)
def test_shell_scripts(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if (program := shellcheck()) is None:
        pytest.skip("shellcheck is not installed")
    command = [program, "--shell=bash", "--external-sources", path]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def directives() -> dict[str, str]:
    """sbatch reads them up to the first command, and passes later ones over in silence."""
    lines = SBATCH.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert not [line for line in lines[first:] if "#SBATCH" in line]
    found = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines if line.startswith("#SBATCH")]
    assert all(found), "a directive is --name or --name=value, and nothing behind it"
    assert len({entry[1] for entry in found}) == len(found)
    return {entry[1]: entry[2] or "" for entry in found}


def test_directives_of_the_slurm_file():
    told = directives()
    assert SBATCH.read_text().startswith("#!/bin/bash\n")
    receiver, _, seconds = told["signal"].partition("@")
    assert receiver == "B:TERM"  # to the batch step alone, which is `lumina launch`
    assert 60 < int(seconds) < 3600
    assert told["ntasks-per-node"] == "1"  # an agent each
    assert {"requeue", "no-kill"} <= set(told)
    assert told["open-mode"] == "append"  # a job that is requeued writes to the same file
    assert "%j" in told["output"]


def test_the_slurm_file_calls_our_command(tmp_path, monkeypatch):
    """Run as the batch step runs it: `lumina` takes the place of the shell, and has its arguments as they are."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"export PATH={tmp_path}/venv/bin:$PATH\n")
    program = tmp_path / "venv" / "bin" / "lumina"
    program.write_text('#!/bin/sh\necho $$\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    arguments = ["configs/7b.yaml", "data.shards=[a b]", "run.dir=x'$y"]
    batch = subprocess.Popen(
        ["bash", SBATCH, *arguments],
        env=os.environ | {"LUMINA_VENV": str(tmp_path / "venv")},
        stdout=subprocess.PIPE,
        text=True,
    )
    pid, *words = batch.communicate(timeout=300)[0].splitlines()
    assert int(pid) == batch.pid  # SIGTERM to the batch step reaches it
    assert words[0] == "launch"
    assert words[-3:] == arguments
    read = accepted(words[1:], monkeypatch)
    assert (read["launcher"], read["config"], read["overrides"]) == ("slurm", "configs/7b.yaml", arguments[1:])


def examples(path: Path, begin: str) -> list[list[str]]:
    """Commands that a text names, with what it leaves out for the reader."""
    lines = [line.strip("# ") for line in path.read_text().splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(begin)]


def test_examples_of_sbatch_are_accepted(monkeypatch):
    found = [*examples(SBATCH, "sbatch "), *examples(GUIDE, "sbatch ")]
    assert len(found) >= 3
    for words in found:
        ours = words[words.index("launch/slurm.sbatch") + 1 :]
        accepted(["--launcher", "slurm", *ours], monkeypatch)
        assert {word[2:].partition("=")[0] for word in words[1 : words.index("launch/slurm.sbatch")]} <= {
            *directives(),
            *("dependency", "test-only"),
        }


def test_examples_of_launch_in_the_guide_are_accepted(monkeypatch):
    found = examples(GUIDE, "lumina launch ")
    assert len(found) >= 5
    for words in found:
        words = [word.replace("CONFIG", "configs/7b.yaml") for word in words[2:] if word not in ("key=value", "…")]
        accepted(words, monkeypatch)


def test_the_hostfile_is_read_here_and_by_deepspeed():
    hosts = read_hostfile(HOSTFILE)
    assert [(host.name, len(host.slots)) for host in hosts] == [(f"node-{n}", s) for n, s in enumerate((8, 8, 8, 4), 1)]
    assert (hosts[2].python, hosts[2].directory) == ("~/lumina/.venv/bin/python", "~/lumina")
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert dict(runner.fetch_hostfile(str(HOSTFILE))) == {host.name: len(host.slots) for host in hosts}


def test_what_the_operator_writes_is_a_hostfile(tmp_path):
    """mpi-operator of kubeflow: pkg/controller/mpi_job_controller.go, newConfigMap, in new and old versions."""
    path = tmp_path / "hostfile"
    path.write_text("j-worker-0.j-worker.ns.svc slots=8\nj-worker-1.j-worker slots=8\n")
    eight = tuple(range(8))
    assert read_hostfile(path) == [Host("j-worker-0.j-worker.ns.svc", eight), Host("j-worker-1.j-worker", eight)]


@pytest.fixture
def job():
    return yaml.safe_load(JOB.read_text())


def containers(job: dict) -> dict[str, dict]:
    """The one container of each role."""
    found = {}
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        (found[role],) = replica["template"]["spec"]["containers"]
    return found


def test_fields_of_the_mpijob(job):
    """Its own schema, kubeflow.org/v2beta1: pkg/apis/kubeflow/v2beta1/types.go of mpi-operator."""
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    spec = job["spec"]
    own = {"slotsPerWorker", "sshAuthMountPath", "launcherCreationPolicy", "runPolicy", "mpiReplicaSpecs"}
    assert set(spec) <= own | {"mpiImplementation", "runLauncherAsWorker"}
    assert spec["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")
    policy = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy"}
    assert set(spec["runPolicy"]) <= policy | {"suspend", "managedBy"}
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert set(spec["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    for replica in spec["mpiReplicaSpecs"].values():
        assert set(replica) <= {"replicas", "template", "restartPolicy"}
        assert replica["restartPolicy"] in ("Never", "OnFailure", "Always", "ExitCode")
        assert "restartPolicy" not in replica["template"]["spec"]  # the operator puts its own in the place
    assert spec["mpiReplicaSpecs"]["Launcher"]["restartPolicy"] != "Always"  # of a Job, which its launcher becomes


def test_pod_templates_have_the_form_of_kubernetes(job):
    kubernetes = pytest.importorskip("kubernetes_validate")
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        # What the operator adds, without which there is no pod.
        template = replica["template"] | {"metadata": {"labels": {"role": role.lower()}}}
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": role.lower()}, "template": template}
        for version in ("1.31", kubernetes.latest_version()):
            kubernetes.validate(whole, version, strict=True)
        whole["template"]["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(whole, kubernetes.latest_version(), strict=True)


def test_volumes_and_devices_of_the_pods(job):
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        container = containers(job)[role]
        volumes = {volume["name"]: volume for volume in replica["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
        assert container["workingDir"] in mounts  # one folder in all pods
        if role == "Worker":
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            resources = container["resources"]
            assert resources["limits"] == resources["requests"]
            assert resources["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]


def test_commands_of_the_pods(job, tmp_path, monkeypatch):
    """The shell's part is a script; what it ends in are arguments that our parser accepts."""
    for container in containers(job).values():
        shell, option, script, *zeroth = container["command"]
        assert (shell, option) == ("sh", "-c")
        assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
        if (program := shellcheck()) is not None:
            checked = subprocess.run([program, "--shell=sh", "-"], input=script, capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout
        assert bool(zeroth) == bool(container.get("args"))  # $0 of a script with arguments
    program, verb, *words = containers(job)["Launcher"]["args"]
    assert (Path(program).name, verb) == ("lumina", "launch")
    read = accepted(words, monkeypatch)
    assert (str(read["hostfile"]), read["launcher"]) == ("/etc/mpi/hostfile", "ssh")
    assert read["overrides"][0].startswith("run.dir=/mnt/lumina/")


def test_ssh_of_the_launcher_does_not_ask(job):
    """What is written to /etc/ssh/ssh_config.d is what ssh reads."""
    ssh = shutil.which("ssh")
    if ssh is None:
        pytest.skip("ssh is not installed")
    script = containers(job)["Launcher"]["command"][2]
    assert "> /etc/ssh/ssh_config.d/lumina.conf" in script
    written = subprocess.run(
        ["sh", "-c", script.replace("/etc/ssh/ssh_config.d/lumina.conf", "/dev/stderr"), "sh", "true"],
        capture_output=True,
        text=True,
    ).stderr
    read = subprocess.run([ssh, "-G", "-F", "/dev/stdin", "any"], input=written, capture_output=True, text=True)
    settings = dict(line.split(" ", 1) for line in read.stdout.splitlines() if " " in line)
    assert settings["stricthostkeychecking"] == "false"
    assert settings["userknownhostsfile"] == "/dev/null"
