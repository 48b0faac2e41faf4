"""The command line as its users meet it: help, exit codes, and one sentence for whatever is wrong.

The shape checks of the tests would refuse some input before our own words do, so every command runs outside this
process, all of them in one other.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lumina import __version__
from tests.parallel.runs import tiny_config
from tests.parallel.workers import PATIENCE

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Reads [[name, arguments], …], writes {name: [exit code, stdout, stderr, files before, files after]}.
DRIVER = """
import contextlib, io, json, pathlib, sys
from lumina.cli import main

def files(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))

folder, results = sys.argv[1], {}
for name, arguments in json.load(sys.stdin):
    out, err, before = io.StringIO(), io.StringIO(), files(folder)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    results[name] = [code, out.getvalue(), err.getvalue(), before, files(folder)]
json.dump(results, sys.stdout)
"""

SMALL = ["--height", "4", "--width", "4", "--steps", "1"]

# What is refused: arguments, and words that the sentence holds. CONFIG, DIR, MODEL and RUN are put in.
REFUSED = {
    "unknown option": ("sample MODEL --out DIR/new --promt two", "unknown option --promt; did you mean --prompt?"),
    "unknown option of train": ("train CONFIG --devug", "unknown option --devug; did you mean --debug?"),
    "unknown verb": ("smaple", "'smaple' (choose from"),
    "no verb": ("", "VERB"),
    "a word for a number": (
        "sample MODEL --out DIR/new --prompt two --count many",
        "--count: invalid int value: 'many'",
    ),
    "no config": ("train DIR/none.yaml", "none.yaml: no such configuration file"),
    "unknown key": ("train CONFIG train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
    "wrong type": ("train CONFIG train.steps=ten", "train.steps: input should be a valid integer, not 'ten'"),
    "no equals sign": ("train CONFIG train.steps", "section.key=value"),
    "unknown model key": ("train CONFIG model.n_layer=2", "unknown key model.n_layer; did you mean model.n_layers?"),
    "heads": (
        "train CONFIG model.n_heads=3",
        "model.n_heads=3 does not divide model.dim=16; the nearest that does is 2",
    ),
    "text for a number": ("train CONFIG model.n_layers='2'", "model.n_layers is '2'; it must be int"),
    "number for a bool": ("train CONFIG model.learn_sigma=1", "model.learn_sigma is 1; it must be bool"),
    "bool for a number": ("train CONFIG model.n_layers=true", "model.n_layers is True; it must be int"),
    "float for a number": ("train CONFIG model.dim=16.0", "model.dim is 16.0; it must be int"),
    "text of another width": ("train CONFIG text.width=24", "set model.cap_feat_dim=24"),
    "channels": ("train CONFIG model.in_channels=2", "model.in_channels=2 makes vae.model identity take 2 channels"),
    "missing shards": ("train CONFIG data.shards=[DIR/none]", "DIR/none"),
    "no shards": ("train CONFIG data.shards=[]", "data.shards"),
    "a small pack": ("train CONFIG train.tokens_per_pack=10", "set it to at least 20"),
    "bf16 without ZeRO": ("train CONFIG precision=bf16 parallel.zero_stage=0", "parallel.zero_stage 1, 2 or 3"),
    "tensor parallel": ("train CONFIG parallel.tensor=2", "parallel.tensor=2"),
    "sequence parallel": ("train CONFIG parallel.sequence=true", "parallel.sequence"),
    "packs per forward": ("train CONFIG train.packs_per_forward=3", "the nearest number that does is 2"),
    "a weight without use": ("train CONFIG flow.weighting=velocity", "weighting velocity"),
    "a run folder of something else": ("train CONFIG run.dir=DIR/other", "is not empty and holds no run of Lumina"),
    "a run folder that is a file": ("train CONFIG run.dir=DIR/file", "run.dir=DIR/file cannot be written"),
    "a run folder in /proc": ("train CONFIG run.dir=/proc/lumina/run", "run.dir=/proc/lumina/run cannot be written"),
    "another seed": ("train CONFIG run.dir=RUN run.seed=4", "run.seed=4, but RUN was trained with 3"),
    "another flow": ("train CONFIG run.dir=RUN flow.path=gvp", "flow.path=gvp, but RUN was trained with linear"),
    "another model": ("train CONFIG run.dir=RUN model.n_layers=3", "model.n_layers=3, but RUN was trained with 2"),
    "no prompt": ("sample MODEL --out DIR/new", "give --prompt TEXT or --prompts-file F"),
    "empty prompts file": ("sample MODEL --out DIR/new --prompts-file DIR/empty", "--prompts-file DIR/empty is empty"),
    "no prompts file": ("sample MODEL --out DIR/new --prompts-file DIR/none", "DIR/none cannot be read: No such file"),
    "prompts that are no text": (
        "sample MODEL --out DIR/new --prompts-file DIR/bytes",
        "cannot be read: it is not UTF-8 text",
    ),
    "count 0": ("sample MODEL --out DIR/new --prompt two --count 0", "--count is 0; it must be at least 1"),
    "a seed below 0": ("sample MODEL --out DIR/new --prompt two --seed -1", "--seed is -1; it must be at least 0"),
    "batch size 0": ("sample MODEL --out DIR/new --prompt two --batch-size 0", "--batch-size is 0"),
    "no folder given": ("sample MODEL --prompt two", "--out"),
    "out is a file": ("sample MODEL --out DIR/file --prompt two", "--out DIR/file is not an empty folder"),
    "out under a file": ("sample MODEL --out DIR/file/new --prompt two", "--out DIR/file/new cannot be written"),
    "out in /proc": ("sample MODEL --out /proc/lumina --prompt two", "--out /proc/lumina cannot be written"),
    "out is not empty": ("sample MODEL --out DIR/other --prompt two", "is not an empty folder; name a new one"),
    "no model folder": ("sample DIR/none --out DIR/new --prompt two", "DIR/none: no such folder"),
    "model is a file": ("sample DIR/file --out DIR/new --prompt two", "DIR/file: no such folder"),
    "model is something else": ("sample DIR/other --out DIR/new --prompt two", "it is no model folder"),
    "model without weights": ("sample DIR/weightless --out DIR/new --prompt two", "no model*.safetensors"),
    "a height of no patches": ("sample MODEL --out DIR/new --prompt two --height 5 --width 4", "multiples of 2 pixels"),
    "height 0": ("sample MODEL --out DIR/new --prompt two --height 0 --width 4", "multiples of 2 pixels"),
    "steps 0": ("sample MODEL --out DIR/new --prompt two --height 4 --width 4 --steps 0", "steps must be at least 1"),
    "unknown solver": ("sample MODEL --out DIR/new --prompt two --height 4 --width 4 --solver eular", "euler"),
    "frames": ("sample MODEL --out DIR/new --prompt two --height 4 --width 4 --frames 2", "built without frames"),
    "no such device": (
        "sample MODEL --out DIR/new --prompt two --device cuda:9",
        "--device cuda:9 cannot be used here",
    ),
    "guidance that is no number": ("sample MODEL --out DIR/new --prompt two --guidance nan", "finite number"),
    "an unknown rope": ("sample MODEL --out DIR/new --prompt two --rope nkt", "nkt"),
    "rope at an unknown length": (
        "sample MODEL --out DIR/new --prompt two --rope ntk",
        "rope ntk needs the length that the model was trained at",
    ),
    "a switch of no rope": ("sample MODEL --out DIR/new --prompt two --rope-switch 0.5", "rope_switch is 0.5 and rope"),
    "proportional to nothing": (
        "sample MODEL --out DIR/new --prompt two --proportional-attention",
        "proportional attention needs the length",
    ),
    "an interval backwards": (
        "sample MODEL --out DIR/new --prompt two --guidance-interval 0.9 0.1",
        "guidance_interval is 0.9 to 0.1; it is two times",
    ),
    "too many channels": (
        "sample MODEL --out DIR/new --prompt two --guided-channels 2",
        "guided_channels is 2; the latents have 1 channels",
    ),
    "a seed beyond torch's": ("sample MODEL --out DIR/new --prompt two --seed 99999999999999999999", "--seed is 999"),
    "a device without data": ("sample MODEL --out DIR/new --prompt two --device meta", "--device meta cannot be used"),
    "an infinite rate": ("train CONFIG train.learning_rate=.inf", "train.learning_rate: input should be a finite"),
    "no wandb": ("train CONFIG log.wandb_project=lumina", "pip install 'lumina-t2x[wandb]'"),
    "labels beyond the classes": (
        "train CONFIG text=null model.cap_feat_dim=null model.num_classes=5",
        "has no label from 0 to 4",
    ),
    "preview of another size": ("train CONFIG preview.every=1 preview.prompts=[a] preview.height=7", "multiples of 2"),
    "preview with no solver": (
        "train CONFIG preview.every=1 preview.prompts=[a] preview.height=8 preview.width=8 preview.solver=eular",
        "the solvers are euler",
    ),
    "preview of frames": (
        "train CONFIG preview.every=1 preview.prompts=[a] preview.height=8 preview.width=8 preview.frames=2",
        "model.frames=true",
    ),
    "preview of no class": (
        "train CONFIG text=null model.cap_feat_dim=null model.num_classes=10 preview.every=1 preview.prompts=['33'] "
        "preview.height=8 preview.width=8",
        "prompts are classes",
    ),
    "another caption length": ("train CONFIG run.dir=RUN text.max_tokens=4", "text.max_tokens=4, but RUN was trained"),
    "heads that fit no less": (
        "train CONFIG run.dir=RUN model.n_heads=4",
        "model.n_heads=4, but RUN was trained with 2",
    ),
    "digits over something": ("data digits DIR/other", "DIR/other"),
    "index of nothing": ("data index DIR/none", "DIR/none"),
    "check of nothing": ("data check DIR/none", "DIR/none"),
    "shards of no folder": ("data folder DIR/none DIR/new", "DIR/none is no folder"),
    "shards over something": ("data folder DIR/other DIR/other", "DIR/other is not empty"),
    "shards of no size": ("data folder DIR/other DIR/new --shard-size big", "'big' is no number of bytes"),
    "shards of a small size": ("data folder DIR/other DIR/new --shard-size 1kB", "at least 10240 bytes"),
    "neither caption nor label": (
        "data folder DIR/other DIR/new --caption-from none",
        "without captions, give labels by --label-from folder",
    ),
    "captions from elsewhere": ("data folder DIR/other DIR/new --caption-from exif", "invalid choice: 'exif'"),
    "no worker": ("data folder DIR/other DIR/new --workers 0", "workers must be at least 1, not 0"),
    "a table without a column": ("data table DIR/file DIR/new", "--media"),
    "a table of no format": ("data table DIR/file DIR/new --media a --caption b", "DIR/file is no .csv, .tsv"),
    "a table of nothing": ("data table DIR/none.csv DIR/new --media a", "--caption or --label"),
    "no description": ("data lumina DIR/none.yaml DIR/new", "DIR/none.yaml cannot be read"),
    "a description of something else": ("data lumina CONFIG DIR/new", "must hold META"),
}

if find_spec("wandb") is not None:
    del REFUSED["no wandb"]

DONE = {
    "train": ["train", "CONFIG", "run.dir=RUN"],
    "train again": ["--local_rank=0", "train", "CONFIG", "run.dir=RUN"],
    "train on": ["train", "CONFIG", "--local_rank=0", "run.dir=RUN", "train.steps=2"],
    "sample": ["sample", "RUN", "--prompt", "a two", "a six", "--count", "2", "--seed", "7", "--out", "DIR/s", *SMALL],
    "sample again": [
        "sample",
        "RUN",
        "--prompts-file",
        "DIR/prompts",
        "--count",
        "2",
        "--out",
        "DIR/again/deep",
        *SMALL,
        "--seed",
        "7",
        "--batch-size",
        "1",
    ],
    "sample with settings": [
        *(
            "sample",
            "RUN",
            "--prompt",
            "a two",
            "--out",
            "DIR/settings",
            *SMALL,
            "--rope",
            "ntk",
            "--trained-length",
            "3",
        ),
        *("--no-proportional-attention", "--time-shift", "2.5", "--guided-channels", "1"),
        *("--guidance-interval", "0", "0.5"),
    ],
    "version": ["--version"],
}

WITH_TRACEBACK = {"debug first": "--debug train DIR/none.yaml", "debug last": "train DIR/none.yaml --debug"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("cli")
    tree = tiny_config(folder / "unused", digits, train__steps=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "other").mkdir()
    for name, content in (("file", b"x"), ("empty", b" \n\n"), ("bytes", b"\xff\xfe\x00"), ("other/thing", b"x")):
        (folder / name).write_bytes(content)
    (folder / "prompts").write_text("a two\n\n  a six \n", encoding="utf-8")
    (folder / "weightless").mkdir()
    (folder / "weightless" / "config.json").write_text(json.dumps({"model": tree["model"]}))
    return folder


@pytest.fixture(scope="module")
def put_in(folder):
    names = {"CONFIG": folder / "config.yaml", "RUN": folder / "run", "MODEL": folder / "run", "DIR": folder}

    def replaced(text):
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    return replaced


@pytest.fixture(scope="module")
def results(folder, put_in):
    """Exit code, stdout, stderr and files before and after of every command, run one after another."""
    commands = [[name, [put_in(word) for word in words]] for name, words in DONE.items()]
    for name, line in [*WITH_TRACEBACK.items(), *((name, case[0]) for name, case in REFUSED.items())]:
        words = line.split()
        if words[:1] == ["sample"] and "--height" not in words:
            words += SMALL  # where a refusal fails to come, little is drawn
        commands.append([name, [put_in(word) for word in words]])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(results, put_in, name):
    code, out, err, before, after = results[name]
    assert put_in(REFUSED[name][1]) in err
    assert code == 2
    assert out == ""
    assert err.startswith("lumina")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert after == before


@pytest.mark.parametrize("name", WITH_TRACEBACK)
def test_debug_shows_where(results, name):
    code, _, err, *_ = results[name]
    assert code == 2
    assert err.startswith("Traceback (most recent call last):")
    assert err.rstrip().splitlines()[-1].endswith("none.yaml: no such configuration file")


@pytest.mark.parametrize("name", DONE)
def test_good_input_is_done(results, name):
    code, _, err, *_ = results[name]
    assert code == 0, err


def test_a_run_is_made_resumed_and_left_alone(results, folder):
    *_, before, after = results["train"]
    made = set(after) - set(before)
    assert {"run/config.yaml", "run/metrics.jsonl", "run/checkpoints/step_00000001/manifest.json"} <= made
    assert "nothing to do" in results["train again"][2]
    assert "resuming" in results["train on"][2]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_samples_and_their_list(results, folder):
    out = folder / "s"
    records = json.loads((out / "samples.json").read_text())
    assert [record["file"] for record in records] == [f"{i:06d}.png" for i in range(4)]
    assert [record["prompt"] for record in records] == ["a two", "a two", "a six", "a six"]
    assert [record["seed"] for record in records] == [7, 8, 9, 10]
    assert records[0].keys() == {"file", "prompt", "seed", "settings"}
    assert records[0]["settings"]["height"] == 4
    # The digits are trained on at their own size, which only the data tell: nothing is extrapolated.
    off = {"rope": "none", "rope_factor": 1.0, "rope_switch": None, "proportional_attention": False}
    unguided = {"guided_channels": None, "guidance_interval": [0.0, 1.0]}
    expected = {"trained_length": None, "time_shift": 1.0} | off | unguided
    assert expected.items() <= records[0]["settings"].items()
    record = json.loads((folder / "settings" / "samples.json").read_text())[0]["settings"]
    asked = {"rope": "ntk", "rope_factor": 2.0, "rope_switch": None, "proportional_attention": False}
    asked |= {"trained_length": 3, "time_shift": 2.5, "guided_channels": 1, "guidance_interval": [0.0, 0.5]}
    assert asked.items() <= record.items()
    assert sorted(path.name for path in out.iterdir()) == [*(r["file"] for r in records), "samples.json", "sheet.png"]
    assert Image.open(out / "000000.png").size == (4, 4)
    assert "4 samples" in results["sample"][1]


def test_samples_do_not_depend_on_the_batch_size(results, folder):
    for i in range(4):
        one, other = (Image.open(folder / name / f"{i:06d}.png") for name in ("s", "again/deep"))
        differences = [abs(a - b) for a, b in zip(one.getdata(), other.getdata(), strict=True)]
        assert max(differences) <= 1
    assert len({Image.open(folder / "s" / f"{i:06d}.png").tobytes() for i in range(4)}) == 4


def test_version(results):
    assert results["version"][1] == f"lumina {__version__}\n"


@pytest.mark.parametrize(
    "verb",
    [
        verb.split()
        for verb in (
            *("", "train", "sample", "data", "data digits", "data index"),
            *("data folder", "data table", "data lumina", "data check", "data show", "data encode"),
            *("benchmark", "benchmark kernels", "benchmark attention", "benchmark network", "doctor"),
        )
    ],
    ids=lambda verb: "-".join(verb),
)
def test_help_has_an_example(verb, capsys):
    from lumina.cli import main

    with pytest.raises(SystemExit) as end:
        main([*verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  lumina {' '.join(verb)}".rstrip() in shown
    assert "local_rank" not in shown


def test_the_examples_are_understood():
    """Each example is a command that its parser takes."""
    import shlex

    from lumina.cli import _parser

    def parsers(parser):
        yield parser
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for child in action.choices.values():
                    yield from parsers(child)

    examples = [p.epilog.split("\n  ")[1] for p in parsers(_parser())]
    assert len(examples) == 28
    for example in examples:
        for command in example.split("&&"):
            words = shlex.split(command)
            assert words[0] == "lumina"
            _parser().parse_args(words[1:])


@pytest.mark.parametrize(
    "words",
    [
        "train CONFIG a.b=1 c=2 --allow-missing p.*",
        "train CONFIG --allow-missing p.* a.b=1 c=2",
        "train CONFIG a.b=1 --allow-missing p.* c=2",
        "train --allow-missing p.* CONFIG a.b=1 c=2",
    ],
)
def test_settings_may_stand_anywhere(words):
    from lumina.cli import _parser

    parsed = _parser().parse_args(words.split())
    assert (parsed.config, parsed.overrides, parsed.allow_missing) == ("CONFIG", ["a.b=1", "c=2"], ["p.*"])


def test_help_waits_for_no_library():
    code = (
        "import sys\nfrom lumina.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'yaml', 'pydantic', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_python_dash_m():
    """What launchers start; the exit code is the process's."""
    command = [sys.executable, "-m", "lumina", "train", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lumina train: none.yaml: no such configuration file\n"


def test_failures_that_are_not_the_users(monkeypatch, capsys):
    """Exit code 1, the kind of error, and where to learn more; the rank where there are several."""
    from lumina import cli

    def fail(_):
        raise KeyError("x\ny")

    monkeypatch.setattr(cli, "_train", fail)
    assert cli.main(["train", "c.yaml"]) == 1
    assert capsys.readouterr().err == "lumina train: KeyError: 'x\\ny' (--debug shows where)\n"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "_train", lambda _: (_ for _ in ()).throw(RuntimeError("too\nbad")))
    assert cli.main(["train", "c.yaml"]) == 1
    assert capsys.readouterr().err == "lumina train: rank 3: too bad (--debug shows where)\n"
    monkeypatch.setattr(cli, "_train", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["train", "c.yaml"]) == 1
    assert capsys.readouterr().err == "lumina: interrupted\n"
