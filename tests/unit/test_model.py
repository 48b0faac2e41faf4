"""Flag-DiT beyond the reference vectors: sizes, packing, frames, grouped queries, refusals."""

import warnings

import pytest
import torch

from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.flops import forward_flops
from lumina.model.presets import PRESETS
from lumina.model.rope import Extrapolation, rotary_cos_sin
from lumina.model.tokens import NEXTFRAME, NEXTLINE, Captions, layout_of, pack, token_count, unpack

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "in_channels": 3}


def random_model(**changes) -> FlagDiT:
    """Every parameter random, the zero-initialised ones too."""
    torch.manual_seed(0)
    settings = TINY | {"cap_feat_dim": 16} | changes
    model = FlagDiT(FlagDiTConfig(**{k: v for k, v in settings.items() if v is not None}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def conditions(count: int, width: int = 16):
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(count, 5, width, generator=generator)
    mask = torch.arange(5) < torch.tensor([2 + i % 4 for i in range(count)])[:, None]
    return {"cap_feats": feats, "cap_mask": mask}


@pytest.mark.parametrize(
    ("preset", "conditioning", "parameters", "keys"),
    [
        ("600m", {"cap_feat_dim": 4096}, 814_459_936, None),
        ("600m", {"num_classes": 1000}, 609_836_576, None),
        ("3b", {"num_classes": 1000}, 4_237_824_032, None),
        ("5b", {"cap_feat_dim": 4096}, 5_046_643_744, 688),
        ("7b", {"cap_feat_dim": 4096}, 8_371_142_688, None),
        ("7b", {"num_classes": 1000}, 7_293_819_936, None),
    ],
)
def test_public_sizes(preset, conditioning, parameters, keys):
    with torch.device("meta"):
        model = FlagDiT(FlagDiTConfig.from_dict({"preset": preset, **conditioning}))
    assert sum(p.numel() for p in model.parameters()) == parameters
    if keys is not None:
        assert len(model.state_dict()) == keys


def test_head_dims_and_ffn_of_the_presets():
    configs = {name: FlagDiTConfig.from_dict({"preset": name}) for name in PRESETS}
    assert {name: c.head_dim for name, c in configs.items()} == {"600m": 48, "3b": 96, "5b": 96, "7b": 128}
    assert {name: c.ffn_dim for name, c in configs.items()} == {"600m": 4096, "3b": 8192, "5b": 8192, "7b": 11008}


def test_a_new_model_predicts_zero_and_passes_blocks_through():
    torch.manual_seed(0)
    model = FlagDiT(FlagDiTConfig(**TINY, cap_feat_dim=16))
    out = model(torch.randn(2, 3, 4, 4), torch.rand(2), **conditions(2))
    assert torch.equal(out, torch.zeros_like(out))
    assert model.eol_token.detach().std() == pytest.approx(0.02, rel=0.4)
    assert model.t_embedder.mlp[0].weight.detach().std() == pytest.approx(0.02, rel=0.1)
    bound = (6 / (32 + 32)) ** 0.5  # Xavier-uniform
    largest = model.layers[0].attention.wq.weight.abs().max()
    assert 0.95 * bound < largest <= bound


def test_a_sample_does_not_depend_on_its_pack():
    model = random_model(frames=True)
    samples = [torch.randn(3, 4, 6), torch.randn(2, 3, 6, 4), torch.randn(3, 2, 2), torch.randn(3, 4, 6)]
    t = torch.rand(4)
    c = conditions(4)
    together = model(samples, t, **c)
    for i, sample in enumerate(samples):
        alone = model([sample], t[i : i + 1], c["cap_feats"][i : i + 1], c["cap_mask"][i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, atol=2e-5, rtol=1e-4)
        assert together[i].shape == sample.shape


def test_a_batch_is_a_pack_of_equal_lengths():
    model = random_model()
    x, t, c = torch.randn(3, 3, 4, 6), torch.rand(3), conditions(3)
    torch.testing.assert_close(model(x, t, **c), torch.stack(model(list(x), t, **c)), atol=0, rtol=0)


def test_samples_need_not_be_contiguous():
    model = random_model()
    x, t, c = torch.randn(2, 3, 6, 4).transpose(2, 3), torch.rand(2), conditions(2)
    assert torch.equal(model(x, t, **c), model(x.contiguous(), t, **c))


def test_masked_caption_tokens_are_not_read():
    model = random_model()
    x, t, c = torch.randn(2, 3, 4, 4), torch.rand(2), conditions(2)
    changed = c["cap_feats"].masked_fill(~c["cap_mask"][..., None], 99.0)
    assert torch.equal(model(x, t, **c), model(x, t, changed, c["cap_mask"]))
    assert not torch.equal(model(x, t, **c), model(x, t, c["cap_feats"] + 0.1, c["cap_mask"]))


def test_one_frame_is_exactly_the_image_path():
    model = random_model(frames=True)
    images, t, c = torch.randn(2, 3, 4, 6), torch.rand(2), conditions(2)
    assert torch.equal(model(images, t, **c), model(images[:, None], t, **c)[:, 0])


def test_frames_are_ordered_and_marked():
    model = random_model(frames=True)
    video, t, c = torch.randn(1, 3, 3, 4, 4), torch.rand(1), conditions(1)
    out = model(video, t, **c)
    swapped = model(video[:, [1, 0, 2]], t, **c)
    assert not torch.allclose(out, swapped[:, [1, 0, 2]], atol=1e-3)
    with torch.no_grad():
        model.nextframe_token.zero_()
    assert not torch.allclose(out, model(video, t, **c), atol=1e-4)


def test_layout_of_two_frames():
    layout = layout_of([(2, 1, 4, 6)], 2, True, "cpu")
    row = [0, 0, 0, NEXTLINE]
    assert layout.kind_t.tolist() == row + row + [NEXTFRAME] + row + row
    assert layout.position_t.tolist() == list(range(17))
    assert layout.lengths == (17,) == (token_count(2, 4, 6, 2, True),)
    assert layout_of([(2, 1, 4, 6)], 2, False, "cpu").lengths == (12,) == (token_count(2, 4, 6, 2, False),)


def test_pack_and_unpack_are_inverse_and_ordered_channels_first():
    samples = [torch.randn(1, 3, 4, 6), torch.randn(2, 3, 2, 4)]
    layout = layout_of([tuple(s.shape) for s in samples], 2, True, "cpu")
    rows = pack(samples, layout)
    assert torch.equal(rows[0], samples[0][0, :, :2, :2].flatten())
    assert rows[layout.kind_t != 0].abs().sum() == 0
    for sample, back in zip(samples, unpack(rows, layout), strict=True):
        assert torch.equal(sample, back)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(kv_heads):
    """A grouped model gives what a full one gives whose key and value heads are repeats (no norm over keys)."""
    grouped = random_model(n_kv_heads=kv_heads, qk_norm=False)
    full = random_model(qk_norm=False)
    state = grouped.state_dict()
    for key in list(state):
        if key.endswith((".wk.weight", ".wv.weight", ".wk_y.weight", ".wv_y.weight")):
            heads = state[key].unflatten(0, (kv_heads, 8))
            state[key] = heads.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x, t, c = torch.randn(2, 3, 4, 4), torch.rand(2), conditions(2)
    torch.testing.assert_close(grouped(x, t, **c), full(x, t, **c), atol=1e-4, rtol=1e-4)


def test_grouped_queries_shrink_keys_and_norms():
    model = random_model(n_kv_heads=2)
    attention = model.layers[0].attention
    for module in (attention.wk, attention.wv, attention.wk_y, attention.wv_y):
        assert module.weight.shape[0] == 16
    assert attention.k_norm.weight.shape == attention.ky_norm.weight.shape == (16,)
    out = model(torch.randn(1, 3, 4, 4), torch.rand(1), **conditions(1))
    assert out.isfinite().all()


def test_label_conditional_model():
    model = random_model(cap_feat_dim=None, num_classes=10)
    assert not any("_y" in k.replace("y_embedder", "") or "token" in k or "gate" in k for k in model.state_dict())
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    by_class = model(x, t, labels=torch.tensor([3, 10]))  # 10 is "none"
    assert not torch.allclose(by_class, model(x, t, labels=torch.tensor([4, 10])), atol=1e-4)
    assert model.layout([(1, 3, 4, 4)], torch.device("cpu")).lengths == (4,)


def test_sequences_beyond_the_public_table():
    """Public code asserts at 40,000 tokens; positions are real there too."""
    cos, sin = rotary_cos_sin(torch.tensor([0, 131_071]), 128)
    i = torch.arange(0, 128, 2, dtype=torch.float64) / 128
    angle = 131_071 * 10000.0**-i
    torch.testing.assert_close(cos[1].double(), angle.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin[1].double(), angle.sin(), atol=1e-7, rtol=0)
    model = random_model(n_layers=1, dim=8, n_heads=1)
    wide = torch.randn(1, 3, 2, 100_000)
    with torch.no_grad():
        out = model.embed(
            pack([wide], model.layout([(1, 3, 2, 100_000)], wide.device)),
            model.layout([(1, 3, 2, 100_000)], wide.device),
        )
    assert out.shape == (50_001, 8)


def test_position_interpolation_and_ntk_angles():
    cos, _ = rotary_cos_sin(torch.tensor([6]), 8, Extrapolation(rope_scaling_factor=2.0, ntk_factor=4.0))
    expected = torch.cos(3.0 * 40000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    torch.testing.assert_close(cos[0].double(), expected, atol=1e-7, rtol=0)


def test_modulation_gradients_reach_every_parameter():
    model = random_model(frames=True)
    out = model([torch.randn(2, 3, 4, 4)], torch.rand(1), **conditions(1))
    out[0].square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().sum() == 0)]
    assert silent == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 30}, ["n_heads=4", "dim=30", "nearest that does is 3"]),
        ({"dim": 36, "n_heads": 12}, ["must be even"]),
        ({"n_kv_heads": 3}, ["n_kv_heads=3", "n_heads=4"]),
        ({"num_classes": 10}, ["num_classes", "cap_feat_dim"]),
        ({"n_layers": 0}, ["n_layers", "at least 1"]),
    ],
)
def test_bad_sizes_are_refused(changes, words):
    with pytest.raises(ValueError, match="model") as caught:
        FlagDiTConfig(**(TINY | {"cap_feat_dim": 16} | changes))
    for word in words:
        assert word in str(caught.value)


def test_unknown_model_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"model.n_layer; did you mean model.n_layers\?"):
        FlagDiTConfig.from_dict({"n_layer": 3})
    with pytest.raises(ValueError, match="600m, 3b, 5b, 7b"):
        FlagDiTConfig.from_dict({"preset": "8b"})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, c: m(torch.randn(1, 3, 5, 4), torch.rand(1), **c), "multiples of 2"),
        (lambda m, c: m(torch.randn(1, 4, 4, 4), torch.rand(1), **c), "in_channels=3"),
        (lambda m, c: m([torch.randn(4, 4)], torch.rand(1), **c), r"a sample is \(4, 4\)"),
        (lambda m, c: m(torch.randn(1, 3, 4, 4), torch.rand(1), c["cap_feats"]), "cap_mask is None"),
        (
            lambda m, c: m(torch.randn(1, 3, 4, 4), torch.rand(1), torch.randn(1, 5, 8), c["cap_mask"]),
            "cap_feat_dim=16",
        ),
        (lambda m, c: m(torch.randn(2, 3, 4, 4), torch.rand(1), **c), "as many of each"),
        (lambda m, c: m(torch.randn(1, 2, 3, 4, 4), torch.rand(1), **c), "frames=True"),
        (lambda m, c: m(torch.randn(1, 3, 4, 4), torch.rand(1), labels=torch.tensor([1])), "takes cap_feats"),
        (lambda m, c: m.forward_with_cfg(torch.randn(1, 3, 4, 4), torch.rand(1), **c), "doubled batch"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(random_model(), conditions(1))


def test_a_caption_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"caption 1 .* no tokens"):
        Captions.from_padded(torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_flops_of_the_hand_count():
    """7B per layer and token: forward plus twice forward, text branch left out."""
    config = FlagDiTConfig.from_dict({"preset": "7b", "num_classes": 1000})
    fewer = FlagDiTConfig.from_dict({"preset": "7b", "num_classes": 1000, "n_layers": 31})
    for length, mega in ((4096, 1415), (32768, 2825), (131072, 7657)):
        layer = forward_flops(config, [length]).total - forward_flops(fewer, [length]).total
        assert 3 * layer / length / 1e6 == pytest.approx(mega, rel=0.001)


def test_flops_equal_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(n_kv_heads=2)
    x, t, c = torch.randn(2, 3, 8, 8), torch.rand(2), conditions(2)
    c["cap_mask"][:] = True  # a padded key would be counted by torch and is no work of the model
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, t, **c)
    ours = forward_flops(model.config, [20, 20], [5, 5]).total
    assert ours == counter.get_total_flops()


def test_no_warning_on_an_ordinary_call():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        random_model()(torch.randn(1, 3, 4, 4), torch.rand(1), **conditions(1))
