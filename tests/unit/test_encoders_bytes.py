"""The `bytes` text encoder: what its features are, that they never change, and that they need no library."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from lumina.config.schema import TextConfig
from lumina.encoders.text import build_text_encoder


def encoder(**settings):
    return build_text_encoder(TextConfig(**settings))


def similarity(one: str, other: str) -> float:
    """Cosine of the last token's features, far from each other in place and neighbour only if the words differ."""
    features, _ = encoder(width=512)([one, other])
    return float(torch.nn.functional.cosine_similarity(features[0, -1], features[1, -1], dim=0))


def test_shapes_mask_and_padding():
    features, mask = encoder(width=32)(["a red circle", "", "one"])
    assert features.shape == (3, 4, 32)
    assert features.dtype == torch.float32
    assert mask.tolist() == [[True] * 4, [True, False, False, False], [True, True, False, False]]
    assert features[~mask].abs().max() == 0
    assert not features.requires_grad


def test_features_are_the_documented_sum():
    """Second token of `Red, dog`, rebuilt from the hash alone."""

    def draw(purpose: bytes, data: bytes) -> np.ndarray:
        raw = hashlib.shake_256(b"lumina bytes 1/" + purpose + b"/" + data).digest(2 * 8)
        values = [int.from_bytes(raw[i : i + 2], "little", signed=True) for i in range(0, 16, 2)]
        return np.array(values) / (65536 / 12**0.5)

    grams = [b"<r", b"re", b"ed", b"d,", b",>", b"<re", b"red", b"ed,", b"d,>", b"<red", b"red,", b"ed,>"]
    spelling = sum(draw(b"gram", gram) for gram in grams) / 12**0.5
    expected = 0.15**0.5 * draw(b"word", b"red") + 0.45**0.5 * spelling
    expected = expected + 0.2**0.5 * draw(b"before", b"") + 0.2**0.5 * draw(b"place", b"1")
    features, _ = encoder(width=8)(["Red, dog"])
    np.testing.assert_allclose(features[0, 1].numpy(), expected, rtol=1e-4)


def test_features_never_change():
    """A model trained on these features must find them again in later releases and on other machines."""
    features, _ = encoder(width=8)(["a Red circle, 数"])
    assert features.shape == (1, 5, 8)
    assert hashlib.sha256(features.numpy().astype("<f4").tobytes()).hexdigest()[:16] == "d1864257590b8a5f"


def test_independent_of_random_state_and_batch():
    torch.manual_seed(1)
    alone, _ = encoder()(["a red circle"])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    batch, _ = encoder()(["", "a much longer caption with many words", "a red circle"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch[2, :4], alone[0])


def test_unit_variance():
    words = " ".join(f"w{number}x{number * 7919 % 1000}" for number in range(500))
    features, _ = encoder(width=64, max_tokens=500)([words])
    assert abs(float(features.var()) - 1) < 0.05
    assert abs(float(features.mean())) < 0.1


def test_words_of_similar_spelling_are_near():
    assert similarity("seven", "SEVEN!") > 0.75
    assert similarity("triangle", "triangles") > 0.5
    assert similarity("triangle", "trianlge") > similarity("triangle", "seventeen") + 0.1
    # The place alone is shared by other words.
    assert similarity("cat", "dog") < 0.5


def test_order_and_neighbours_matter():
    features, _ = encoder()(["red circle blue square", "blue circle red square"])
    assert not torch.allclose(features[0, 2], features[1, 2])


@pytest.mark.parametrize(
    "caption", ["\0", "   \n", "🙂🙂", "数字七", "\ud800 lone surrogate", "a" * 10_000, "—", "é" * 40]
)
def test_any_unicode(caption):
    features, mask = encoder(max_tokens=16)([caption])
    assert features.isfinite().all()
    assert 1 <= int(mask.sum()) <= 16


def test_east_asian_characters_are_words():
    _, mask = encoder()(["数字七 seven"])
    assert int(mask.sum()) == 5


def test_captions_are_cut():
    full, _ = encoder()(["one two three four five"])
    cut, mask = encoder(max_tokens=3)(["one two three four five"])
    assert torch.equal(cut, full[:, :3])
    assert mask.all()


def test_bf16_is_honoured():
    exact, _ = encoder()(["a red circle"])
    coarse, _ = encoder(dtype="bf16")(["a red circle"])
    assert torch.equal(coarse, exact.to(torch.bfloat16).float())
    assert coarse.dtype == torch.float32


def test_description_and_attributes():
    made = encoder(width=48, max_tokens=20)
    assert (made.width, made.max_tokens) == (48, 20)
    assert "bytes" in made.describe()
    assert "48" in made.describe()


def test_refusals():
    with pytest.raises(ValueError, match=r"text\.layer"):
        encoder(layer=-2)
    with pytest.raises(ValueError, match="no captions"):
        encoder()([])


def test_no_heavy_imports_and_checks_without_hook():
    """In a fresh interpreter, without the annotation checks that tests run under."""
    code = """
import sys, torch
from lumina.config.schema import TextConfig, VaeConfig
from lumina.encoders.text import build_text_encoder
from lumina.encoders.vae import build_vae
encoder = build_text_encoder(TextConfig()); encoder(["a red circle", ""])
vae = build_vae(VaeConfig(), 3); vae.decode(vae.encode(torch.zeros(1, 3, 4, 4), None))
def refused(call):
    try: call()
    except ValueError as error: print(error)
refused(lambda: encoder("a lone string"))
refused(lambda: encoder([1]))
refused(lambda: vae.encode(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "diffusers", "huggingface_hub"}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert "list of captions" in lines[0]
    assert "list of captions" in lines[1]
    assert "floating-point pixels" in lines[2]
    assert lines[3] == "[]"
