"""`lumina benchmark baseline`: the plain model computes what ours does, and the numbers of a run add up."""

import json
import re
import statistics

import pytest
import torch

from lumina.benchmark import baseline
from lumina.benchmark.baseline import stirred
from lumina.benchmark.mixes import caption_lengths, patches_of
from lumina.benchmark.plain_flag_dit import PlainFlagDiT
from lumina.benchmark.plain_training import PaddedBatch, PlainTraining
from lumina.cli import main
from lumina.config.exits import BAD_INPUT
from lumina.config.schema import TrainConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT

SMALL = {"dim": 48, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "cap_feat_dim": 8}
SIZES = [(4, 6), (2, 2), (10, 4)]


def both(**settings):
    """Both models with the same weights, none of them zero."""
    torch.manual_seed(0)
    config = FlagDiTConfig(**SMALL | settings)
    ours, plain = stirred(FlagDiT(config)), PlainFlagDiT(config)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def batch():
    torch.manual_seed(1)
    latents = [torch.randn(4, height, width) for height, width in SIZES]
    captions, mask = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    return latents, torch.tensor([0.1, 0.5, 0.9]), captions, mask


@pytest.mark.parametrize("settings", [{}, {"n_kv_heads": 2}, {"qk_norm": False}, {"learn_sigma": False}], ids=str)
def test_the_plain_model_is_ours(settings):
    """Each sample's velocity, and the gradient of every parameter, of samples and captions of unequal lengths."""
    ours, plain = both(**settings)
    inputs = batch()
    cotangents = [torch.randn_like(sample) for sample in inputs[0]]
    gradients = []
    for model in (ours, plain):
        velocities = model(*inputs)
        sum((v * c).sum() for v, c in zip(velocities, cotangents, strict=True)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if name != "pad_token"})
        if model is ours:
            expected = [v.detach() for v in velocities]
    for found, wanted in zip(velocities, expected, strict=True):
        assert wanted.abs().max() > 0.01  # not the zero that both begin with
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert wanted.any(), name
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: n + text)
    assert not plain.pad_token.grad.any()  # padding is seen by nothing that counts


def test_padding_changes_nothing():
    _, plain = both()
    latents, t, captions, mask = batch()
    together = plain(latents, t, captions, mask)
    for i, latent in enumerate(latents):
        alone = plain([latent], t[i : i + 1], captions[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_the_plain_step_is_adamw_on_the_mean_of_samples():
    """fp32; every sample counts the same, whatever its size; the average follows the weights."""
    _, plain = both()
    before = plain.final_layer.linear.weight.detach().clone()
    train = TrainConfig(steps=1, ema_decay=0.75, clip_norm=1e9)
    training = PlainTraining(plain, train, "fp32", 0.5)
    latents, t, captions, mask = batch()
    noise = [torch.randn_like(latent) for latent in latents]
    with torch.no_grad():
        noised = [(1 - s) * n + s * x for s, n, x in zip(t, noise, latents, strict=True)]
        errors = [
            ((v - x + n) ** 2).mean() for v, x, n in zip(plain(noised, t, captions, mask), latents, noise, strict=True)
        ]
    loss = training.differentiate(PaddedBatch(latents, captions, mask), noise, t)
    assert loss == pytest.approx(float(sum(errors) / 3), rel=1e-5)
    sign = plain.final_layer.linear.weight.grad.sign()
    training.update()
    weight = plain.final_layer.linear.weight.detach()
    settled = sign != 0
    torch.testing.assert_close((before - weight)[settled], 0.5 * sign[settled], rtol=1e-2, atol=1e-2)  # Adam's first
    number = [name for name, _ in plain.named_parameters()].index("final_layer.linear.weight")
    torch.testing.assert_close(training.averages[number], 0.75 * before + 0.25 * weight)
    assert plain.final_layer.linear.weight.grad is None


def test_masters_in_bf16():
    _, plain = both()
    training = PlainTraining(plain, TrainConfig(steps=1), "bf16", 1e-6)
    latents, t, captions, mask = batch()
    noise = [torch.randn_like(latent) for latent in latents]
    start = [master.clone() for master in training.masters]
    training.step(PaddedBatch(latents, captions, mask), noise, t)
    for parameter, master in zip(plain.parameters(), training.masters, strict=True):
        assert (parameter.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(parameter, master.bfloat16())
    # Steps that bf16 would lose.
    assert any(
        not torch.equal(a, b) and torch.equal(a.bfloat16(), b.bfloat16())
        for a, b in zip(start, training.masters, strict=True)
    )


WORDS = ["benchmark", "baseline", "--resolution", "64", "--samples", "5", "--text-tokens", "6", "--repeats", "2"]


def run(*words):
    return main([*WORDS, *words, *(f"model.{key}={value}" for key, value in SMALL.items())])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers_add_up(tmp_path, capsys, dtype):
    out = tmp_path / "row.json"
    assert run("--dtype", dtype, "--out", str(out)) == 0
    row = json.loads(out.read_text())["rows"][0]
    rows, columns = torch.tensor(row["sizes"]).T
    lengths = rows * (columns + 1)
    assert row["samples"] == len(lengths) == 5
    assert (row["tokens"], row["padded_tokens"]) == (lengths.sum(), 5 * lengths.max())
    assert (row["caption_tokens"], row["padded_caption_tokens"]) == (6 + 4 + 3 + 2 + 6, 30)
    assert row["parameters"] == sum(p.numel() for p in FlagDiT(FlagDiTConfig(**SMALL)).parameters())
    assert len(row["ours"]) == len(row["plain"]) == 2
    ratios = [plain / ours for plain, ours in zip(row["plain"], row["ours"], strict=True)]
    assert row["ratio"] == pytest.approx(statistics.median(ratios))
    assert row["losses"][0] == pytest.approx(row["losses"][1], rel=1e-5 if dtype == "fp32" else 1e-2)
    said = capsys.readouterr().out
    assert (
        f"{row['tokens']}; padded {row['padded_tokens']}, of which {1 - row['tokens'] / row['padded_tokens']:.1%}"
        in said
    )
    assert re.search(rf"plain / ours +\| {row['ratio']:.2f} \(", said)


def test_two_steps_that_differ_are_not_timed(monkeypatch, capsys):
    """As if the plain model had another epsilon in its last norm."""
    made = PlainFlagDiT.__init__

    def other(self, config):
        made(self, config)
        self.final_layer.norm_final.eps = 0.1

    monkeypatch.setattr(PlainFlagDiT, "__init__", other)
    monkeypatch.setattr(baseline, "_seconds", lambda *_: pytest.fail("timed"))
    assert run("--dtype", "fp32") == 1
    assert (
        "the two steps do not compute the same: from the same weights and samples our loss" in capsys.readouterr().err
    )


def test_mixes():
    assert patches_of("uniform", 3, 256) == [(16, 16)] * 3
    mixed = patches_of("mixed", 9, 256)
    assert mixed == [(16, 16), (11, 22), (22, 11), (14, 18), (18, 14), (8, 8), (12, 12), (24, 24), (16, 16)]
    wide_to_tall = patches_of("buckets", 4, 256)
    assert wide_to_tall == [(9, 27), (13, 19), (19, 13), (27, 9)]
    assert caption_lengths("mixed", 5, 128) == (128, 96, 64, 32, 128)
    assert caption_lengths("uniform", 2, 128) == (128, 128)
    assert caption_lengths("buckets", 4, 1) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--repeats", "0"], "--repeats 0 is too few"),
        (["--resolution", "100"], "--resolution 100 cannot be cut into patches; give a multiple of 16, at least 32"),
        (["parallel.recompute=full"], "of the section parallel set zero_stage alone"),
        (["flow.path=gvp"], "flow.path=gvp with flow.prediction=velocity: the plain step learns"),
        (["model.frames=true"], "leave model.num_classes and model.frames out"),
    ],
)
def test_what_is_refused(words, sentence, capsys):
    assert run(*words) == BAD_INPUT
    assert sentence in capsys.readouterr().err
