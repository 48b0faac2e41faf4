"""Captions on regions and shared style, held against masked attention and against samples drawn apart."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lumina import LuminaPipeline
from lumina.cli import main
from lumina.inference.compose import Region, caption_groups
from lumina.inference.style import Style, shared_keys
from lumina.model.flag_dit import FlagDiT
from lumina.model.reach import CaptionGroups, Reach
from lumina.model.tokens import Captions, layout_of, pack
from tests.unit.test_pipeline import LABELS, seeded, write_folder

LEFT, RIGHT = Region("a three", 0, 0, 0.5, 1), Region("a seven", 0.5, 0, 1, 1)
CALL = {"height": 4, "width": 8, "num_inference_steps": 3, "time_shift": 1.0}


@pytest.fixture
def pipeline(tmp_path):
    return LuminaPipeline.from_pretrained(write_folder(tmp_path / "model"))


def text(length, seed, width=16):
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def groups_of(layout, regions, captions, of_regions, composed=None):
    return caption_groups(layout, regions, captions, of_regions, len(captions) if composed is None else composed)


def test_tokens_go_to_the_regions_that_hold_their_middle():
    layout = layout_of([(2, 1, 4, 8)], 2, True, "cpu")  # two rows of four patches and a nextline, twice
    corner = Region("corner", 0.5, 0.5, 1, 1)
    groups = groups_of(layout, [LEFT, corner], [text(5, 0)], [text(2, 1), text(3, 2)])
    found = [groups.captions.lengths[group] for group in groups.group_t.tolist()]
    frame = [2, 2, 5, 5, 5, 2, 2, 3, 3, 3]  # the whole's caption has 5 tokens
    assert found == [*frame, 5, *frame]


def test_a_patch_in_two_regions_follows_both_and_the_plain_sample_none():
    layout = layout_of([(1, 1, 4, 8)] * 2, 2, True, "cpu")
    whole, of_regions = [text(5, 0), text(4, 3)], [text(2, 1), text(3, 2)]
    over = Region("over", 0.25, 0, 1, 1)
    groups = groups_of(layout, [LEFT, over], whole, of_regions, composed=1)
    assert [groups.captions.lengths[group] for group in groups.group_t.tolist()] == [2, 5, 3, 3, 3] * 2 + [4] * 10
    both = groups.captions.features.split(groups.captions.lengths)[groups.group_t[1]]
    assert torch.equal(both, torch.cat(of_regions))
    assert groups.sample_g.tolist() == [0] * (len(groups.sample_g) - 1) + [1]


def masked_text(q_the, k_she, v_she, allowed_ts):
    """Attention in float64 with a mask, one head after another."""
    scores = torch.einsum("the,she->hts", q_the.double(), k_she.double()) / q_the.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed_ts, -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights, v_she.double())


def test_the_text_branch_is_masked_attention(pipeline):
    """Three overlapping regions: each token attends to the captions of the regions that it lies in, and no others."""
    model = pipeline.model
    layout = model.layout([(1, 1, 8, 8)], torch.device("cpu"))
    regions = [LEFT, Region("b", 0.25, 0.25, 1, 0.75), Region("c", 0, 0.5, 0.75, 1)]
    features = [text(3, 1), text(6, 2), text(2, 3)]
    whole = text(4, 0)
    groups = groups_of(layout, regions, [whole], features)
    attention = model.layers[0].attention
    inputs = model.attention_inputs(layout, None, reach=Reach(groups))
    q = torch.randn(len(layout.position_t), 2, 8, generator=seeded())
    found = attention._text_branch(q, groups.captions.features, inputs.text_plan, inputs.text_order_t)
    captions = torch.cat([whole, *features])
    owner = torch.tensor([0] * 4 + [1] * 3 + [2] * 6 + [3] * 2)
    allowed = torch.zeros(len(q), len(captions), dtype=torch.bool)
    for token in range(len(q)):
        row, column = divmod(token, 5)
        x, y = (min(column, 3) + 0.5) / 4, (row + 0.5) / 4
        inside = [i + 1 for i, r in enumerate(regions) if r.left <= x < r.right and r.top <= y < r.bottom]
        allowed[token] = torch.isin(owner, torch.tensor(inside or [0]))
    k = attention.ky_norm(attention.wk_y(captions)).unflatten(-1, (2, 8))
    v = attention.wv_y(captions).unflatten(-1, (2, 8))
    expected = attention.gate.tanh()[:, None].double() * masked_text(q, k, v, allowed)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_one_group_of_all_tokens_is_the_plain_model(pipeline):
    """And so is a region over everything, whatever the rest's caption."""
    model, shape = pipeline.model, (1, 1, 4, 8)
    layout = model.layout([shape], torch.device("cpu"))
    caption = Captions.of(text(5, 0), (5,))
    x, t = pack([torch.randn(shape, generator=seeded())], layout), torch.tensor([0.3])
    group = CaptionGroups(torch.zeros(len(layout.position_t), dtype=torch.long), caption, torch.tensor([0]))
    plain = model(x, t, layout=layout, captions=caption)
    torch.testing.assert_close(model(x, t, layout=layout, captions=caption, reach=Reach(group)), plain)
    everywhere = [Region("a three", 0, 0, 1, 1)]
    drawn = pipeline("a five", generator=seeded(), regions=everywhere, **CALL).latents
    torch.testing.assert_close(drawn, pipeline("a three", generator=seeded(), **CALL).latents)


def test_every_region_counts_and_nothing_is_nan(pipeline):
    many = [Region(f"number {i}", i / 4, j / 2, (i + 1) / 4, (j + 1) / 2) for i in range(4) for j in range(2)]
    drawn = pipeline("", generator=seeded(), regions=many, **CALL).latents
    assert drawn.isfinite().all()
    for number, region in enumerate(many):
        other = [*many[:number], replace(region, prompt="something else"), *many[number + 1 :]]
        assert not torch.equal(pipeline("", generator=seeded(), regions=other, **CALL).latents, drawn)


def test_a_region_without_a_patch_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"^region 'thin' holds the middle of no patch; .* 1/4 of the width"):
        pipeline("", regions=[Region("thin", 0.0, 0, 0.1, 1)], **CALL)


@pytest.mark.parametrize(
    ("box", "prompt", "sentence"),
    [
        ((0.5, 0, 0.5, 1), "a", "0 ≤ left < right ≤ 1"),
        ((0, 0, 1.5, 1), "a", "0 ≤ left < right ≤ 1"),
        ((0, float("nan"), 1, 1), "a", "0 ≤ top < bottom ≤ 1"),
        ((0, 0, 1, 1), "  ", "a region has no caption"),
    ],
)
def test_regions_that_are_none(box, prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        Region(prompt, *box)


def test_labels_have_no_regions(tmp_path):
    with pytest.raises(ValueError, match="takes no regions"):
        LuminaPipeline.from_pretrained(write_folder(tmp_path / "labels", LABELS))(3, 4, 4, regions=[LEFT])


def test_shared_keys_are_masked_self_attention():
    """Sample i sees the leader and itself, in either half of a doubled batch; the leader itself alone."""
    layout = layout_of([(1, 1, 4, 4)] * 6, 2, True, "cpu")
    keys, length = shared_keys(layout, halves=2, leader=1), layout.lengths[0]
    seen = keys.source_s.split(keys.plan.key_lengths)
    for sample, tokens in enumerate(seen):
        leader = 1 if sample < 3 else 4
        allowed = {leader, sample}
        assert set((tokens // length).tolist()) == allowed
        assert len(tokens) == length * len(allowed) == len(set(tokens.tolist()))


def test_the_first_sample_leads(pipeline):
    """It is drawn as if alone, and a follower does not depend on the other followers."""
    prompts = ["a one", "a two", "a three"]
    seeds = lambda *numbers: [torch.Generator().manual_seed(number) for number in numbers]  # noqa: E731
    together = pipeline(prompts, generator=seeds(0, 1, 2), style=Style(), **CALL).latents
    alone = pipeline(prompts, generator=seeds(0, 1, 2), **CALL).latents
    torch.testing.assert_close(together[:1], alone[:1])
    assert (together[1:] - alone[1:]).abs().amax() > 1e-2
    pair = pipeline([prompts[0], prompts[2]], generator=seeds(0, 2), style=Style(), **CALL).latents
    torch.testing.assert_close(pair[1], together[2])


def test_the_style_of_a_picture(pipeline):
    """Followers depend on the picture and on what it is said to show, and the call returns them alone."""
    dark, light = (Image.new("L", (8, 4), level) for level in (0, 255))
    draw = lambda style: pipeline(["a one", "a two"], generator=seeded(), style=style, **CALL)  # noqa: E731
    found = draw(Style(dark, "a bar"))
    assert found.latents.shape == (2, 1, 1, 4, 8)
    assert torch.equal(found.latents, draw(Style(dark, "a bar")).latents)
    for other in (Style(light, "a bar"), Style(dark, "a circle"), Style(dark, "a bar", seed=1)):
        assert not torch.equal(draw(other).latents, found.latents)
    with pytest.raises(ValueError, match="has no prompt"):
        Style(prompt="a bar")


def test_a_known_reference_is_its_own_path(pipeline):
    """What followers see of the picture at time t is t·picture + (1-t)·noise, by the calls of the model."""
    picture, calls, forward = Image.new("L", (8, 4), 200), [], FlagDiT.forward

    def recorded(self, x, t, *rest, **named):
        calls.append((t[0].item(), x[1]))
        return forward(self, x, t, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlagDiT, "forward", recorded)
        pipeline("a one", guidance_scale=1.0, generator=seeded(), style=Style(picture, seed=3), **CALL)
    noise = torch.randn(1, 1, 1, 4, 8, generator=torch.Generator().manual_seed(3))[0]
    assert len(calls) == 3
    for t, seen in calls:
        torch.testing.assert_close(seen, t * (200 / 127.5 - 1) + (1 - t) * noise, atol=1e-6, rtol=1e-5)


def sample(tmp_path, name, *options):
    out = tmp_path / name
    size = ["--height", "4", "--width", "8", "--steps", "2"]
    return main(["sample", str(tmp_path / "model"), *size, "--out", str(out), *options]), out


def test_the_command(pipeline, tmp_path, capsys):
    boxes = ["--region", "0", "0", "0.5", "1", "a three", "--region", "0.5", "0", "1", "1", "a seven"]
    code, out = sample(tmp_path, "regions", *boxes)
    assert code == 0
    (record,) = json.loads((out / "samples.json").read_text())
    assert record["settings"]["regions"] == [["0", "0", "0.5", "1", "a three"], ["0.5", "0", "1", "1", "a seven"]]
    pipeline = LuminaPipeline.from_pretrained(tmp_path / "model")
    image = pipeline("", 4, 8, 1, 2, generator=torch.Generator().manual_seed(0), regions=[LEFT, RIGHT]).images[0]
    assert Image.open(out / "000000.png").tobytes() == image.tobytes()
    for options, sentence in (
        (["--region", "0", "0", "half", "1", "a"], "are four numbers from 0 to 1"),
        (["--prompt", "a", "--style-prompt", "b"], "give that, too"),
        (["--prompt", "a", "--style-of", "x.png", "--share-style"], "not both"),
        (["--prompt", "a", "--style-of", str(tmp_path / "x.png")], "no such picture"),
    ):
        capsys.readouterr()
        assert sample(tmp_path, "refused", *options)[0] == 2
        assert sentence in capsys.readouterr().err


def test_a_shared_style_does_not_depend_on_batches(pipeline, tmp_path):
    prompts = ["--prompt", *(f"number {i}" for i in range(5))]
    _, whole = sample(tmp_path, "whole", *prompts, "--share-style", "--batch-size", "5")
    _, parts = sample(tmp_path, "parts", *prompts, "--share-style", "--batch-size", "2")
    _, without = sample(tmp_path, "without", *prompts, "--batch-size", "5")
    pixels = lambda folder, i: torch.tensor(list(Image.open(folder / f"{i:06d}.png").tobytes()))  # noqa: E731
    for i in range(5):
        assert (pixels(whole, i) - pixels(parts, i)).abs().max() <= 1
    assert any(not torch.equal(pixels(whole, i), pixels(without, i)) for i in range(1, 5))
