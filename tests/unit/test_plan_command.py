"""`lumina plan`, the verb: what it heeds and refuses, and what it prints and writes."""

import json
from dataclasses import asdict, replace

import pytest
import yaml

from lumina.benchmark import rates
from lumina.benchmark.network import LINK, WITHIN
from lumina.benchmark.plan_work import work_of
from lumina.cli import main
from lumina.config.devices import DEVICES
from lumina.config.load import load_config
from lumina.model.config import FlagDiTConfig
from lumina.planner.cost import Speeds
from lumina.planner.search import axes_of
from tests.unit.plans import SMALL, asked, planned


def content_of(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_layouts_and_settings_that_run(capsys, tmp_path):
    out = tmp_path / "plan.json"
    model = ["model.n_layers=3", "model={n_kv_heads: 8, frames: true}", "model.cap_feat_dim=96"]
    arguments = ["--tokens", "65536", "--gpus", "8", "--device", "h100-80g", "--top", "2", "--samples", "2"]
    assert main(["plan", *arguments, "--memory", "12", "--out", str(out), *model]) == 0
    said = capsys.readouterr().out
    assert "to run the first" in said
    content = json.loads(out.read_text())
    first = content["layouts"][0]
    assert first["fits"]
    assert " ".join(first["settings"]) in said
    assert first["seconds"] == pytest.approx(sum(first["time"].values()))
    states = ("weights", "gradients", "masters", "moments", "ema", "buffers", "activations")
    memory = first["memory"]
    assert memory["on_device"] == sum(memory[name] for name in states) - memory["on_host"]
    # The snippet alone, with what a plan does not know, is a configuration of the planned model and layout.
    tree = yaml.safe_load(said[said.index("    model:") :].split("\n\n")[0])
    tree["train"]["steps"] = 1
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree | {"run": {"dir": "none"}, "data": {"shards": ["none"]}}))
    settings = load_config(str(config), [])
    for word in first["settings"]:
        name, value = word.removeprefix("parallel.").split("=")
        assert str(getattr(settings.parallel, name)).lower() == value
    assert first["settings"]
    assert settings.train.global_batch_packs == content["packs"]
    assert settings.train.tokens_per_pack == 2 * 65536
    sizes = FlagDiTConfig.from_dict(settings.model)
    assert asdict(sizes) == content["sizes"]
    changed = {"dim": 4096, "n_layers": 3, "n_heads": 32, "n_kv_heads": 8, "frames": True, "cap_feat_dim": 96}
    assert sizes == FlagDiTConfig(**changed)
    assert settings.model == content["config"]["model"]
    assert settings.model["preset"] == "7b"
    assert "max_tokens: 128, features 96 wide" in said


def test_the_snippet_of_classes(capsys):
    words = ["--gpus", "1", "--model", "600m", "--text-tokens", "0", "model.num_classes=7", "precision=fp32"]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    tree = yaml.safe_load(said[said.index("    model:") :])
    assert (tree["model"]["num_classes"], tree["precision"]) == (7, "fp32")
    assert "max_tokens" not in said


def test_json_says_why_not(capsys):
    content = content_of(capsys, "--model", "600m", "--gpus", "2", "--memory", "8", "--tokens", "65536")
    layouts = content["layouts"]
    assert {one["fits"] for one in layouts} == {True, False}
    for one in layouts:
        if one["fits"]:
            assert one["why"] is None
        else:
            gib = one["memory"]["on_device"] / 2**30
            assert one["why"].startswith(f"{gib:,.1f} GiB of {6 * 0.95:,.1f}: ")


def test_a_plan_says_why_not(capsys):
    assert main(["plan", "--model", "7b", "--gpus", "3", "--memory", "12", "--host-memory", "32"]) == 0
    said = capsys.readouterr().out
    assert "GiB of 9.5: " in said
    assert "none of" in said
    assert "cannot run" in said


def test_a_mapping_is_laid_over_its_section(capsys):
    """As the settings in it would be, one by one: held fixed, or changing the model that --model names."""
    one = content_of(capsys, "--gpus", "4", "parallel={tensor: 2, recompute: full}", "model={n_layers: 4}")
    other = content_of(capsys, "--gpus", "4", "parallel.tensor=2", "parallel.recompute=full", "model.n_layers=4")
    assert one == other
    assert one["sizes"]["dim"] == 4096
    assert len(one["layouts"]) == 4
    for layout in one["layouts"]:
        assert {"parallel.tensor=2", "parallel.recompute=full"} <= set(layout["settings"])


def test_packs_by_either_name(capsys):
    one, other = (content_of(capsys, "--gpus", "1", *w) for w in (["--packs", "6"], ["train.global_batch_packs=6"]))
    assert one == other
    assert one["packs"] == 6


def test_layouts_that_fixed_settings_exclude_are_said(capsys):
    """Nothing is left out: each product that divides the devices is a layout, or is refused with its reason."""
    content = content_of(capsys, "--gpus", "4", "parallel.zero_stage=3", "parallel.sequence=true")
    refused = {tuple(one["axes"]): one["reason"] for one in content["refused"]}
    assert len(refused) + len(content["layouts"]) == len(list(axes_of(4, 32)))
    assert "parallel.zero_stage=3 does not go with parallel.pipeline=2" in refused[2, 2, 1, 1]
    assert "with parallel.tensor=1 set it to false" in refused[1, 1, 4, 1]


@pytest.fixture
def a_cpu(monkeypatch):
    """A machine of two ranks on two cores, with 8 GiB each."""

    def here(precision, per_host):
        speeds = Speeds.of(DEVICES["l40s-48g"], precision, per_host)
        return replace(DEVICES["l40s-48g"], name="a share", memory=8 * 2**30), replace(speeds, cores=2)

    monkeypatch.setattr(rates, "here", here)


def test_nothing_is_reserved_for_cuda_on_a_cpu(a_cpu, capsys):
    assert planned(device="here", gpus=2).memory == pytest.approx(8 * 2**30 * 0.95)
    assert planned(device="l40s-48g", memory=8.0).memory == pytest.approx(6 * 2**30 * 0.95)
    assert planned(device="here", gpus=2, memory=1.0).memory == pytest.approx(2**30 * 0.95)
    words = ["--device", "here", "--model", "600m", "--tokens", "1024", "--gpus", "2"]
    assert main(["plan", *words]) == 0
    assert "; 7.6 GiB of each to plan with\n" in capsys.readouterr().out
    for wrong, sentence in (
        (["--host-memory", "64"], "a CPU's memory is its host's"),
        (["parallel.offload_optimizer=true"], "parallel.offload_optimizer=true would move to a CPU what is on it"),
        (["parallel.offload_activations=true"], "parallel.offload_activations=true would move to a CPU"),
    ):
        assert main(["plan", *words, *wrong]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["plan", "--device", "here", "--fit", "devices"]) == 2
    assert "ranks of a CPU share its memory" in capsys.readouterr().err


def test_scaling_is_of_the_fastest_layouts(capsys):
    """Weak, from 2,048 to 4,096 devices of which each layout is tensor parallel over a host, so that there are few."""
    fixed = ["parallel.tensor=8", "parallel.pipeline=1", "parallel.ulysses=1", "parallel.zero_stage=1"]
    arguments = ["plan", "--scaling", "weak", "--gpus", "2048", "--packs", "512", *fixed]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "4,096 tokens a pack, 0.25 packs a step for each device\nh100-80g, 8 to a host; " in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[4:]]
    assert [row[:2] for row in rows if row[0] != ""][-2:] == [["2,048", "512"], ["4,096", "1,024"]]
    rates_of = [float(row[4].replace(",", "")) for row in rows[-2:]]
    assert rows[-1][5] == f"{rates_of[1] / rates_of[0] / 2:.1%}"


def test_scaling_says_where_nothing_can_run(capsys):
    """2,048 packs are shared by as many devices, and not by twice as many, each alone."""
    fixed = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "ulysses", "ring")]
    assert main(["plan", "--scaling", "strong", "--gpus", "2048", "--packs", "2048", *fixed]) == 0
    said = capsys.readouterr().out
    assert "| 2,048   | 2,048 | data 2048 " in said
    assert "| 4,096   | 2,048 | none can run " in said
    assert "4,096 devices: no layout of these devices can run with" in said
    assert main(["plan", "--scaling", "strong", "--gpus", "2048", "--packs", "7", *fixed]) == 2
    assert "train.global_batch_packs=7 cannot be shared by 2048" in capsys.readouterr().err


SETTINGS = [
    (["train.tokens_per_pack=8192"], "train.tokens_per_pack is said by --tokens and --samples"),
    (["train={tokens_per_pack: 8192}"], "train.tokens_per_pack is said by --tokens and --samples"),
    (["train.packs_per_forward=2"], "train.packs_per_forward is said by --samples"),
    (["train.global_batch_packs=8", "--packs", "8"], "--packs and train.global_batch_packs= say the same"),
    (["precision=fp32", "--dtype", "bf16"], "--dtype and precision= say the same"),
    (["model.preset=3b"], "model.preset is said by --model"),
    (["model={preset: 3b}"], "model.preset is said by --model"),
    (["text.max_tokens=64"], "text.max_tokens is said by --text-tokens"),
    (["train.learning_rate=1e-3"], "a plan does not depend on train.learning_rate: leave it out"),
    (["vae=null"], "vae: input should be"),
    (["text=null"], "a plan does not depend on text"),
    (["parallel={tensr: 2}"], "unknown key parallel.tensr; did you mean parallel.tensor?"),
    (["train.lerning_rate=1"], "did you mean train.learning_rate?"),
    (["model.num_classes=10"], "reads no captions, and they are planned with 128 tokens: give --text-tokens 0"),
    (["model.cap_feat_dim=64", "--text-tokens", "0"], "--text-tokens 0 plans a label-conditional one"),
    (["model.n_layers=100000"], "model.n_layers=100000: plans are made for numbers up to 256"),
    (["model.ffn_dim_multiplier=.nan"], "model.ffn_dim_multiplier=nan: plans are made for numbers up to"),
    (["model.ffn_dim_multiplier=5000.0"], "the feed-forward width 54,610,176"),
]
EXCLUDING = [
    (["parallel.zero_stage=0"], "with parallel.zero_stage=0: precision=bf16 needs parallel.zero_stage 1, 2 or 3"),
    (
        ["parallel.zero_stage=3", "parallel.pipeline=2"],
        "with parallel.pipeline=2 parallel.zero_stage=3: parallel.zero_stage=3 does not go with parallel.pipeline=2",
    ),
    (["parallel.offload_activations=true", "parallel.recompute=none"], "set parallel.recompute=full"),
    (
        ["parallel.offload_optimizer=true", "parallel.zero_stage=0", "precision=fp32"],
        "parallel.offload_optimizer=true needs parallel.zero_stage 1, 2 or 3",
    ),
    (["parallel.sequence=true", "--gpus", "1"], "with parallel.tensor=1 set it to false"),
    (["parallel.ring=3"], "a world of 8 processes cannot be laid out as parallel.ring=3, which takes a multiple of 3"),
    (["parallel.pipeline=64", "--gpus", "64"], "set it to at most 32"),
    (["--gpus", "9", "parallel.tensor=2"], "no layout of these devices can run with parallel.tensor=2"),
    (["--packs", "7", *(f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "ring", "ulysses"))], "packs=7 cannot"),
]
OPTIONS = [
    (["--device", "h1000"], "--device h1000 is not one of a100-40g"),
    (["--model", "8b"], "--model 8b is not one of 600m"),
    (["--gpus", "12", "--nodes", "5"], "--gpus 12 cannot be shared evenly by --nodes 5; 4 could share them"),
    (["--tokens", "0"], "--tokens must be a number from 1 to 134,217,728, not 0"),
    (["--tokens", "-5"], "--tokens must be a number from 1"),
    (["--packs", str(10**400)], "--packs must be a number from 1 to 1,073,741,824"),
    (["--samples", "100000"], "--samples must be a number from 1 to 4,096"),
    (["--gpus", "100000"], "--gpus must be a number from 1 to 16,384"),
    (["--top", "0"], "--top must be a number from 1"),
    (["--memory", "inf"], "--memory must be a number from 0.001"),
    (["--host-memory", "nan"], "--host-memory must be a number from 0.001"),
    (["--memory", "1"], "a device of 1.0 GiB has nothing to plan with"),
    (["--interconnect", "50"], "--interconnect is of devices on several hosts, and 8 are on one"),
    (["--interconnect", "0", "--gpus", "16"], "--interconnect must be a number from 0.001"),
    (["--network", "no.json"], "--network no.json cannot be read: No such file"),
    (["--network", "/"], "--network / cannot be read: Is a directory"),
    (["--json", "--top", "3"], "--top is of tables"),
    (["--json", "--simulate", "1"], "--simulate is of tables"),
    (["--scaling", "weak", "--out", "x.json"], "--scaling prints one answer"),
    (["--scaling", "weak", "--top", "3"], "--scaling prints one answer"),
    (["--scaling", "weak", "--fit", "model"], "ask for different things"),
    (["--scaling", "weak", "--gpus", "12"], "a power of two"),
    (["--scaling", "weak", "parallel.zero_stage=0"], "8 devices: no layout of these devices can run with"),
    (["--measured", "/"], "--measured / cannot be read"),
    (["--measured", "x", "--gpus", "4"], "--measured does not take --gpus: each row says it"),
    (["--measured", "x", "--memory", "4"], "--measured does not take --memory: it asks how fast"),
    (["--measured", "x", "parallel.tensor=2"], "--measured does not take parallel.tensor"),
]


@pytest.mark.parametrize(("arguments", "sentence"), [*SETTINGS, *EXCLUDING, *OPTIONS])
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def network(tmp_path, *rows):
    path = tmp_path / "network.json"
    path.write_text(json.dumps({"rows": [{"what": what, "bandwidth": speed} for what, speed in rows]}))
    return str(path)


def test_measured_networks_are_taken(tmp_path, capsys):
    path = network(tmp_path, (WITHIN, 3e9), (LINK, 5e8), (LINK, 2e8))
    speeds = planned(network=path).speeds
    assert (speeds.link, speeds.network) == (3e9, 2e8)
    assert main(["plan", "--gpus", "16", "--network", path, "--interconnect", "10"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    within = network(tmp_path, (WITHIN, 3e9))
    speeds = work_of(asked(*SMALL, network=within, interconnect=10.0, gpus=16))[0].speeds
    assert (speeds.link, speeds.network) == (3e9, 10e9 * 0.85)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1", "it is not JSON"),
        ("[]", "it has no list `rows`"),
        ('{"rows": 3}', "it has no list `rows`"),
        ('{"rows": [{}]}', "it has no list `rows`"),
        ('{"rows": []}', "holds no measurement"),
        (json.dumps({"rows": [{"what": LINK, "bandwidth": "fast"}]}), "bandwidth of a measurement link is 'fast'"),
        (json.dumps({"rows": [{"what": WITHIN, "bandwidth": 0}]}), "is 0"),
        (json.dumps({"rows": [{"what": WITHIN}]}), "is None"),
    ],
)
def test_files_that_are_no_records_of_networks(text, sentence, tmp_path, capsys):
    path = tmp_path / "network.json"
    path.write_text(text)
    assert main(["plan", "--network", str(path)]) == 2
    assert sentence in capsys.readouterr().err
