"""Latents and text features: as stored, and nothing that is not what it says."""

import io
import pickle

import numpy as np
import pytest

from lumina.data.decode import BadSampleError, Probe, array, load_latent, load_text_features, probe

LATENT = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 8)).astype(np.float16)


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def with_header(header: str, numbers: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + numbers


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4"])
def test_latents_come_back(dtype: str) -> None:
    values = LATENT.astype(dtype)
    members = {"latent.npy": npy(values), "txt": b"a"}
    assert probe(members) == Probe("latent", 6, 8, 3, 0.0)
    found = load_latent(members)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(load_latent({"latent.npy": npy(np.asfortranarray(values))}), values)


def test_text_features_come_back() -> None:
    values = LATENT.reshape(12, -1)
    empty = values[:3].astype(np.float32)
    caption, none = load_text_features({"text.npy": npy(values), "text.null.npy": npy(empty)})
    np.testing.assert_array_equal(caption, values)
    np.testing.assert_array_equal(none, empty)
    assert (caption.dtype, none.dtype) == (np.float16, np.float32)
    assert load_text_features({"txt": b"a", "text.null.npy": b"not read"}) is None


def test_what_is_no_latent_is_refused(monkeypatch) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("unpickled",))

    spoilt = LATENT.copy()
    spoilt[1, 2, 3, 4, 5] = np.inf
    promise = "{'descr': '<f2', 'fortran_order': False, 'shape': (%s), }"
    for data, message in (
        (npy(LATENT[0]), r"must hold float16 or float32 \(crops, F, C, H, W\), not float16 \(3, 4, 6, 8\)"),
        (npy(LATENT.astype(np.float64)), "float16 or float32 .* not float64"),
        (npy(LATENT[:0]), r"not float16 \(0, 3, 4, 6, 8\)"),
        (npy(LATENT.view(np.int16)), "not int16"),
        (npy(spoilt), "not finite"),
        (npy(LATENT)[:-1], r"promises float16 \(2, 3, 4, 6, 8\) and holds 2303 bytes"),
        (npy(LATENT) + b"x", "holds 2305 bytes"),
        (with_header(promise % "1, 1, 9999999999, 9999999999, 9999999999"), "holds 0 bytes"),
        (with_header(promise % "1, 1, 1, -1, -2", bytes(4)), "latent.npy promises"),
        (
            with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1), }", pickle.dumps(Trap())),
            "plain",
        ),
        (with_header("{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (1,), }", bytes(2)), "plain numbers"),
        (with_header("__import__('os').abort()"), "does not decode"),
        (with_header("(" * 9000), "does not decode"),
        (with_header("{'descr'"), "does not decode"),
        (b"\x93NUMPY\x03\x00" + npy(LATENT)[8:], "version 3.0"),
        (b"\x93NUMPY", "does not decode"),
        (b"", "does not decode"),
        (pickle.dumps(LATENT), "does not decode"),
    ):
        with pytest.raises(BadSampleError, match=message) as caught:
            load_latent({"latent.npy": data})
        assert "\n" not in str(caught.value)
    with pytest.raises(BadSampleError, match="of latents needs"):
        load_latent({"npy": npy(LATENT)})
    assert probe({"latent.npy": npy(spoilt)}).frames == 3  # numbers are looked at when they are used
    monkeypatch.setattr(array, "MAX_ARRAY_BYTES", LATENT.nbytes - 1)
    for read in (probe, load_latent):
        with pytest.raises(BadSampleError, match="of 2304 bytes is larger than 2303"):
            read({"latent.npy": npy(LATENT)})


def test_what_is_no_text_feature_is_refused() -> None:
    values = LATENT.reshape(12, -1)
    for data, message in (
        (npy(values[0]), r"text.npy must hold float16 or float32 \(L, width\), not float16 \(96,\)"),
        (npy(values[:0]), r"not float16 \(0, 96\)"),
        (npy(values / np.float16(0)), "text.npy holds numbers that are not finite"),
        (npy(values)[:-2], "text.npy promises"),
    ):
        for name, other in (("text.npy", "text.null.npy"), ("text.null.npy", "text.npy")):
            with pytest.raises(BadSampleError, match=message.replace("text.npy", name)):
                load_text_features({name: data, other: npy(values)})
    with pytest.raises(BadSampleError, match=r"\(.text.npy\) without those of the empty one \(.text.null.npy\)"):
        load_text_features({"text.npy": npy(values)})
    with pytest.raises(BadSampleError, match=r"text\.npy is 96 wide and text\.null\.npy 48"):
        load_text_features({"text.npy": npy(values), "text.null.npy": npy(values[:, :48])})


def test_random_damage_is_a_bad_sample_and_nothing_else() -> None:
    good, rng, reasons = npy(LATENT), np.random.default_rng(0), []
    for _ in range(400):
        data = bytearray(good)
        for position in rng.integers(0, 140, rng.integers(1, 4)):
            data[position] = rng.integers(256)
        for read in (probe, load_latent):
            try:
                read({"latent.npy": bytes(data)})
            except BadSampleError as error:
                reasons.append(str(error))
    assert len(reasons) > 300
    assert not any("\n" in reason for reason in reasons)
