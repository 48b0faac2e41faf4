"""What a training run is made of: preparing samples, EMA, metrics, and the loss it reports."""

import json
import math
import sys
import types
from dataclasses import dataclass, field, fields, replace

import pytest
import torch

from lumina.checkpoint.load import Checkpoint, model_config
from lumina.config.load import validate
from lumina.config.schema import TextConfig, VaeConfig
from lumina.data.loader import Loader
from lumina.data.plan import DataState
from lumina.encoders.text import TextEncoder, build_text_encoder
from lumina.encoders.vae import build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.flops import forward_flops
from lumina.model.pretrained import build
from lumina.model.tokens import unpack
from lumina.parallel.engine import Engine, StepOutcome
from lumina.parallel.fragments import Fragment
from lumina.parallel.mesh import Mesh, World
from lumina.parallel.randomness import Randomness
from lumina.train.assemble import assemble
from lumina.train.ema import EMA
from lumina.train.metrics import Metrics, StepMetrics, peak_tflops
from lumina.train.prepare import Preparer
from lumina.train.step import train_step
from tests.parallel.runs import metrics_of, tiny_config, train_on

CPU = torch.device("cpu")
TEXT = TextConfig(encoder="bytes", width=16, max_tokens=8)
TINY = FlagDiTConfig(dim=16, n_layers=2, n_heads=2, multiple_of=16, in_channels=1, cap_feat_dim=16)
LABELS = replace(TINY, cap_feat_dim=None, num_classes=5)


class OneProcess(Mesh):
    """A mesh of one, without process groups."""

    def any(self, flag):
        return flag


MESH = OneProcess(World(0, 1, 0), CPU)


@dataclass
class Sample:
    """As the loader decodes it."""

    sample_id: int
    pixels: torch.Tensor | None
    caption: str | None = "a two"
    label: int | None = 2
    epoch: int = 0
    occurrence: int = 0
    latent: torch.Tensor | None = None
    text: torch.Tensor | None = None
    null_text: torch.Tensor | None = None
    encoders: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"key{self.sample_id}"


SHAPES = ((1, 1, 4, 4), (1, 1, 2, 6), (1, 1, 8, 4), (1, 1, 4, 4), (1, 1, 6, 2))


def samples(count=5, **changes):
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        pixels = torch.rand(SHAPES[i % len(SHAPES)], generator=generator) * 2 - 1
        made.append(Sample(**{"sample_id": i, "pixels": pixels, "caption": f"number {i}"} | changes))
    return made


class Recorder(TextEncoder):
    """Keeps the captions that it is asked for."""

    width, max_tokens = 16, 8

    def __init__(self):
        self.captions = []
        self._inner = build_text_encoder(TEXT)

    def describe(self):
        return "recorder"

    def _encode(self, captions):
        self.captions += captions
        return self._inner._encode(captions)


def preparer(model=TINY, text=None, dropout=0.0, seed=3, **flow):
    if model.text_conditional:
        text = text or build_text_encoder(TEXT)
    vae = build_vae(VaeConfig(), model.in_channels)
    return Preparer(model, vae, text, Objective.build(**flow), Randomness(seed), dropout, MESH)


def parts_of(pack):
    """Of each sample: data, noise, time, and caption features."""
    data, noise = unpack(pack.data, pack.layout), unpack(pack.noise, pack.layout)
    captions = pack.captions.features.split(pack.captions.lengths)
    return list(zip(data, noise, pack.t, captions, strict=True))


def test_a_sample_is_prepared_alike_in_any_pack():
    prepare, all_samples = preparer(dropout=0.5), samples()
    together = parts_of(prepare(all_samples))
    backwards = parts_of(prepare(all_samples[::-1]))[::-1]
    alone = [parts_of(prepare([sample]))[0] for sample in all_samples]
    for i, ours in enumerate(together):
        for other in (backwards[i], alone[i]):
            assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_what_is_prepared():
    made = samples()
    pack = preparer()(made)
    assert pack.layout.lengths == (6, 4, 12, 6, 6)
    assert pack.stretch.tokens is pack.stretch.attending is pack.layout  # one process has it all
    randomness, encoder = Randomness(3), build_text_encoder(TEXT)
    for sample, (data, noise, t, features) in zip(made, parts_of(pack), strict=True):
        assert torch.equal(data, sample.pixels)
        assert torch.equal(noise, randomness.normal("noise", sample, tuple(sample.pixels.shape)))
        assert t == pytest.approx(randomness.uniform("time", sample), rel=1e-6)
        assert torch.equal(features, encoder([sample.caption])[0][0])
    times = pack.t_of_token.split(pack.layout.lengths)
    assert [set(part.tolist()) for part in times] == [{t} for t in pack.t.tolist()]


@pytest.mark.parametrize("changed", [{"seed": 4}, {"sample_id": 9}, {"epoch": 1}, {"occurrence": 1}])
def test_noise_and_time_change_with_the_identity(changed):
    one = samples(1)
    seed = changed.pop("seed", 3)
    other = [replace(one[0], **changed)]
    a, b = parts_of(preparer()(one))[0], parts_of(preparer(seed=seed)(other))[0]
    assert torch.equal(a[0], b[0])
    assert not torch.isclose(a[1], b[1]).any()
    assert a[2] != b[2]


def test_time_follows_the_law_of_the_run():
    made = samples(5)
    plain = preparer()(made).t.double()
    shifted = preparer(time_shift=4.0)(made).t.double()
    torch.testing.assert_close(shifted, plain / (plain + 4 - 4 * plain), atol=1e-6, rtol=1e-6)


def test_a_posterior_is_drawn_from_the_sample():
    """An autoencoder with a width is given noise, another than the path's."""
    prepare = preparer()
    given = []
    vae = prepare._vae
    vae.factor, encode = 2, vae.encode
    vae.latent_shape = lambda height, width: (1, height, width)
    vae.encode = lambda pixels, noise: given.append(noise) or encode(pixels, None)
    (sample,) = samples(1)
    pack = prepare([sample])
    assert torch.equal(given[0], Randomness(3).normal("posterior", sample, (1, 1, 4, 4)))
    assert not torch.isclose(given[0], unpack(pack.noise, pack.layout)[0]).any()


def test_dropped_captions_are_empty_ones():
    made, text = samples(40), Recorder()
    preparer(text=text, dropout=0.3)(made)
    kept = [Randomness(3).uniform("caption dropout", sample) >= 0.3 for sample in made]
    assert 5 < sum(kept) < 38
    assert text.captions == [s.caption if keep else "" for s, keep in zip(made, kept, strict=True)]
    for dropout, expected in ((0.0, [s.caption for s in made]), (1.0, [""] * 40)):
        text = Recorder()
        preparer(text=text, dropout=dropout)(made)
        assert text.captions == expected


def test_dropped_labels_are_the_class_none_at_the_given_rate():
    made = samples(1000, pixels=torch.zeros(1, 1, 2, 2))
    pack = preparer(LABELS, dropout=0.1)(made)
    assert pack.captions is None
    assert set(pack.labels.tolist()) == {2, 5}
    dropped = (pack.labels == 5).float().mean().item()
    assert abs(dropped - 0.1) < 4 * math.sqrt(0.09 / 1000)
    # Dropping says nothing about the time.
    assert abs(pack.t[pack.labels == 5].mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / 100)
    kept = preparer(LABELS)(samples(5))
    assert kept.labels.tolist() == [2] * 5
    assert kept.layout.lengths == (4, 3, 8, 4, 3)  # patches alone


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (TINY, {"caption": None}, "sample key0 has no caption"),
        (LABELS, {"label": None}, "sample key0 has no label"),
        (LABELS, {"label": 5}, "sample key0 has label 5; model.num_classes=5 allows 0 to 4"),
        (LABELS, {"label": -1}, "sample key0 has label -1"),
    ],
)
def test_a_missing_condition_is_named_by_key(model, changes, words):
    with pytest.raises(ValueError, match=words):
        preparer(model)(samples(1, **changes))


def test_what_the_model_does_not_take_may_be_missing():
    preparer(TINY)(samples(1, label=None))
    preparer(LABELS)(samples(1, caption=None))


# EMA.


def test_ema_is_the_formula_with_its_warm_up():
    flat = torch.randn(10, generator=torch.Generator().manual_seed(0))
    fragments = [Fragment("a", (2, 3), None, 0, flat, 0, 6), Fragment("b", (9,), None, 5, flat, 6, 4)]
    ema = EMA(fragments, decay=0.99)
    expected = flat.double().clone()
    for step in range(1, 2001):
        flat.add_(torch.randn(10, generator=torch.Generator().manual_seed(step)), alpha=0.1)
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * flat.double()
        ema.update(step)
        if step in (1, 2, 30, 2000):
            torch.testing.assert_close(torch.cat(ema.values).double(), expected, atol=1e-5, rtol=1e-5)
    assert ema.decay_at(1) == pytest.approx(2 / 11)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(10**6) == 0.99


def test_ema_starts_at_the_weights_and_is_a_copy():
    flat = torch.arange(4.0)
    ema = EMA([Fragment("a", (4,), None, 0, flat, 0, 4)], decay=0.9)
    flat.add_(1)
    assert ema.values[0].tolist() == [0, 1, 2, 3]
    ema.restore(lambda fragment: torch.full((fragment.numel,), 7.0))
    assert ema.values[0].tolist() == [7, 7, 7, 7]
    assert flat.tolist() == [1, 2, 3, 4]
    EMA([], decay=0.9).update(1)  # a rank may own nothing


# Metrics.

CONTRACT = {"step", "loss", "grad_norm", "lr", "samples", "tokens", "seconds", "tokens_per_second"}
CONTRACT |= {"tflops_per_device", "mfu", "skipped"}


def line(step, **changes):
    numbers = {field.name: 1 if "int" in str(field.type) else 1.0 for field in fields(StepMetrics)}
    return StepMetrics(
        **numbers | {"step": step, "mfu": None} | dict.fromkeys(("skipped", "spike", "left_out"), False) | changes
    )


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run").mkdir()
    return validate(tiny_config(tmp_path / "run", tmp_path, train__steps=9), "test")


def write_lines(config, steps):
    with Metrics(config, steps[0], enabled=True) as metrics:
        for step in steps:
            metrics.write(line(step))


def test_a_line_a_step_with_the_agreed_keys(config, tmp_path):
    write_lines(config, [1, 2])
    lines = metrics_of(tmp_path / "run")
    assert [one["step"] for one in lines] == [1, 2]
    assert lines[0].keys() >= CONTRACT
    assert lines[0]["mfu"] is None
    assert lines[0]["skipped"] is False


def test_a_line_that_a_power_cut_spoilt_is_dropped(config, tmp_path):
    write_lines(config, [1, 2])
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo\xff\xfe\n\0\0\n')
    write_lines(config, [3])
    assert [one["step"] for one in metrics_of(tmp_path / "run")] == [1, 2, 3]


def test_a_line_is_on_disk_when_it_is_written(config, tmp_path):
    with Metrics(config, 1, enabled=True) as metrics:
        metrics.write(line(1))
        assert len(metrics_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_json_does_not_know_is_not_written(config, number):
    with Metrics(config, 1, enabled=True) as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.write(line(1, tflops_per_device=number))
    with Metrics(config, 1, enabled=True) as metrics:
        metrics.write(line(1, loss=None, grad_norm=None, skipped=True))


def test_a_resumed_run_drops_later_and_broken_lines(config, tmp_path):
    write_lines(config, [1, 2, 3, 4, 5])
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('[1]\n3\n{"loss": 1.0}\n{"step": 2, "lo')
    write_lines(config, [4, 5, 6])
    assert [one["step"] for one in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_weights_and_biases_and_tensorboard_get_the_same_numbers(config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Run:
        def __init__(self, **given):
            self.given, self.lines, self.ended = given, [], None

        def log(self, numbers, step):
            self.lines.append({"step": step} | numbers)

        def finish(self, exit_code):
            self.ended = exit_code

    runs = []
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **given: runs.append(Run(**given)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    log = config.log.model_copy(update={"wandb_project": "project", "tensorboard": True})
    with Metrics(config.model_copy(update={"log": log}), 1, enabled=True) as metrics:
        metrics.write(line(1, samples_per_second=2.5, loss=None))
        metrics.write(line(2, hardware_tflops_per_device=0.125, peak_memory_bytes=3 * 2**30, mfu=0.5))
    lines = metrics_of(tmp_path / "run")
    expected = [{key: value for key, value in one.items() if value is not None} for one in lines]
    (run,) = runs
    assert (run.given["project"], run.given["name"], run.ended) == ("project", "run", 0)
    assert run.lines == expected
    assert (run.lines[0]["samples_per_second"], run.lines[1]["peak_memory_bytes"]) == (2.5, 3 * 2**30)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {(one.step, tag): one.value for tag in events.Tags()["scalars"] for one in events.Scalars(tag)}
    assert shown == {(one["step"], key): value for one in expected for key, value in one.items() if key != "step"}


def test_other_ranks_write_nothing(config, tmp_path, capsys):
    with Metrics(config, 1, enabled=False) as metrics:
        metrics.write(line(1))
        metrics.say("hello")
    assert list((tmp_path / "run").iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("Some other device", None),
    ],
)
def test_peaks_of_known_devices(config, monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    bf16 = config.model_copy(update={"precision": "bf16"})
    gpu = torch.device("cuda", 0)
    assert peak_tflops(bf16, gpu) == peak
    assert peak_tflops(config, gpu) is None  # fp32: the bf16 peak says nothing
    assert peak_tflops(bf16, CPU) is None
    given = config.model_copy(update={"log": config.log.model_copy(update={"peak_tflops": 7.5})})
    assert peak_tflops(given, gpu) == peak_tflops(given, CPU) == 7.5


# The loss.


def plain_loss(model, batch, encoder, seed, dropout, per_sample):
    """The mean over the batch, each sample by itself: `per_sample(network, data, noise, u)`, u uniform, in float64."""
    randomness, losses = Randomness(seed), []
    for sample in (sample for pack in batch.packs for sample in pack):
        data = sample.pixels.double()
        noise = randomness.normal("noise", sample, tuple(data.shape)).double()
        u = randomness.uniform("time", sample)
        caption = "" if randomness.uniform("caption dropout", sample) < dropout else sample.caption
        features, mask = encoder([caption])

        def network(x, t, features=features, mask=mask):
            with torch.no_grad():
                return model([x.float()], torch.tensor([t]), features, mask)[0].double()

        losses.append(per_sample(network, data, noise, u).item())
    return sum(losses) / len(losses)


def velocity_error(network, data, noise, t):
    return (network(t * data + (1 - t) * noise, t) - (data - noise)).square().mean()


def noise_error(network, data, noise, u):
    t = 1e-3 + (1 - 2e-3) * u
    alpha, sigma = math.sin(math.pi * t / 2), math.cos(math.pi * t / 2)
    return (network(alpha * data + sigma * noise, t) - noise).square().mean()


class ForwardOnly(Engine):
    """Calls a model for the losses of packs and leaves it as it is."""

    def __init__(self, model):
        self.model = model

    def accumulate(self, packs, noised, loss):
        outputs = [
            self.model(noised(pack), pack.t, labels=pack.labels, layout=pack.layout, captions=pack.captions)
            for pack in packs
        ]
        return sum(loss(pack, output).item() for pack, output in zip(packs, outputs, strict=True))

    def step(self, learning_rate):
        return StepOutcome(0.0, skipped=False)


@pytest.mark.parametrize(
    ("flow", "per_sample"),
    [({}, velocity_error), ({"path": "gvp", "prediction": "noise"}, noise_error)],
    ids=["velocity", "noise"],
)
def test_the_loss_of_packs_is_that_of_samples(digits, tmp_path, flow, per_sample):
    config = validate(tiny_config(tmp_path / "run", digits, data__caption_dropout=0.4, flow=flow), "test")
    parts = assemble(config, model_config(config), MESH)
    batch = next(iter(Loader(parts.index, parts.plan, parts.sizing, rank=0, world=1, channels=1)))
    torch.manual_seed(0)
    model = FlagDiT(parts.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    prepare = Preparer(parts.model, parts.vae, parts.text, parts.objective, Randomness(3), 0.4, MESH)
    packs = [prepare(pack) for pack in batch.packs]
    assert sum(len(pack.layout.lengths) for pack in packs) == batch.global_samples
    settings = {"global_samples": batch.global_samples, "learning_rate": 1.0, "step": 1}
    ours = train_step(ForwardOnly(model), EMA([], 0.9), parts.objective, packs, **settings).loss_share
    assert ours == pytest.approx(plain_loss(model, batch, parts.text, 3, 0.4, per_sample), rel=1e-5)


@pytest.mark.slow
def test_the_loss_that_a_run_reports(digits, tmp_path):
    """That of step 3 from the weights saved after step 2: a fresh model predicts zero whatever it is given."""
    run_dir = tmp_path / "run"
    changes = {"data__caption_dropout": 0.4, "parallel__recompute": "full", "log__peak_tflops": 2.0}
    train_on(2, tiny_config(run_dir, digits, train__steps=3, checkpoint__every=1, **changes))
    checkpoint = Checkpoint(run_dir / "checkpoints" / "step_00000002")
    parts = assemble(checkpoint.config, model_config(checkpoint.config), MESH)
    state = DataState.from_dict(checkpoint.manifest.data)
    batch = next(iter(Loader(parts.index, parts.plan, parts.sizing, rank=0, world=1, channels=1, state=state)))
    model = build(parts.model, checkpoint.state_dict("master"), "the checkpoint")
    reported = metrics_of(run_dir)[2]
    assert reported["loss"] == pytest.approx(plain_loss(model, batch, parts.text, 3, 0.4, velocity_error), rel=1e-5)
    assert reported["samples"] == batch.global_samples
    assert reported.keys() >= CONTRACT
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[2]) == reported
    seconds = reported["seconds"]
    assert reported["samples_per_second"] == pytest.approx(reported["samples"] / seconds)
    prepare = Preparer(parts.model, parts.vae, parts.text, parts.objective, Randomness(3), 0.4, MESH)
    packs = [prepare(pack) for pack in batch.packs]
    forward = [forward_flops(parts.model, pack.layout.lengths, pack.captions.lengths) for pack in packs]
    once = sum(one.total for one in forward) / seconds / 2 / 1e12  # on each of two ranks
    again = sum(one.in_blocks + one.attention for one in forward) / seconds / 2 / 1e12
    assert reported["tflops_per_device"] == pytest.approx(3 * once)
    assert reported["hardware_tflops_per_device"] == pytest.approx(3 * once + again)
    assert reported["mfu"] == pytest.approx(3 * once / 2)
    peaks = [one["peak_memory_bytes"] for one in metrics_of(run_dir)]
    assert 100 * 2**20 < peaks[0] <= peaks[1] <= peaks[2] < 2**33  # of a process that has imported torch


def test_a_disk_that_takes_nothing_any_more_stops_no_training(config, tmp_path, capsys):
    """Neither a line nor the end of a torn one; when it takes lines again, they are all there."""
    with Metrics(config, 1, enabled=True) as metrics:
        metrics.write(line(1))
        file = metrics._file

        class Broken:
            def write(self, text):
                file.write(text[:7])
                raise OSError(30, "Read-only file system")

            def truncate(self, size):
                raise OSError(30, "Read-only file system")

        metrics._file = Broken()
        metrics.write(line(2))
        metrics.write(line(3))
        metrics._file = file
        metrics.write(line(4))
        metrics._drop_what_is_torn()
    whole = []
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        if text.endswith("}"):
            whole.append(json.loads(text)["step"])
    assert whole == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("may end in a part of a line") == 1
