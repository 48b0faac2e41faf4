"""Audio: right samples at any rate, and damage that is named."""

import io

import numpy as np
import pytest
import soundfile

from lumina.data.decode import BadSampleError, Probe, decode_audio, probe

FORMS = {
    "wav": {"format": "WAV", "subtype": "FLOAT"},
    "flac": {"format": "FLAC", "subtype": "PCM_24"},
    "ogg": {"format": "OGG"},
    "mp3": {"format": "MP3"},
}


def tone(rate: int, seconds: float, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def written(samples: np.ndarray, rate: int, extension: str = "wav") -> dict[str, bytes]:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **FORMS[extension])
    return {extension: stream.getvalue()}


@pytest.mark.parametrize(("extension", "tolerance"), [("wav", 1e-7), ("flac", 1e-6), ("ogg", 0.03), ("mp3", 0.05)])
def test_every_format_gives_its_samples(extension: str, tolerance: float) -> None:
    wave = tone(16000, 0.5)
    members = written(wave, 16000, extension)
    assert probe(members) == Probe("audio", 0, 0, 0, 0.5)
    (found,) = decode_audio(members, 16000)
    assert (found.shape, found.dtype) == ((8000,), np.float32)
    np.testing.assert_allclose(found[500:-500], wave[500:-500], atol=tolerance)


def test_channels_are_averaged() -> None:
    left, right = tone(16000, 0.3), tone(16000, 0.3, 200)
    (found,) = decode_audio(written(np.stack([left, right], 1), 16000), 16000)
    np.testing.assert_allclose(found, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 44056])
def test_resampling_keeps_what_fits_and_nothing_else(rate: int) -> None:
    wanted = 22050
    hertz = 0.43 * min(rate, wanted)  # close below the limit of what fits
    (found,) = decode_audio(written(tone(rate, 0.5, hertz), rate), wanted)
    assert abs(len(found) - wanted * 0.5) <= 1
    inner = slice(1500, -1500)
    np.testing.assert_allclose(found[inner], tone(wanted, 0.5, hertz)[: len(found)][inner], atol=2e-3)
    if rate > wanted:  # what does not fit must vanish, not come back as another tone
        (found,) = decode_audio(written(tone(rate, 0.5, 0.52 * wanted), rate), wanted)
        assert np.abs(found[inner]).max() < 0.5 * 10 ** (-60 / 20)


def test_results_stay_within_full_scale() -> None:
    (found,) = decode_audio(written(tone(16000, 0.1, level=1.5), 16000), 16000)
    assert np.abs(found).max() == 1
    for samples, message in (
        (tone(16000, 0.1, level=3e4), "audio reaches .* where 1 is full scale"),
        (np.full(100, np.nan, np.float32), "not finite"),
        (np.zeros(0, np.float32), "no samples"),
    ):
        with pytest.raises(BadSampleError, match=message):
            decode_audio(written(samples, 16000), 16000)


def test_flac_of_unknown_length_is_refused() -> None:
    data = bytearray(written(tone(16000, 0.5), 16000, "flac")["flac"])
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that say how many samples there are
    data[22:26] = bytes(4)
    for read in (probe, lambda members: decode_audio(members, 16000)):
        with pytest.raises(BadSampleError, match="does not say how long it is"):
            read({"flac": bytes(data)})


def test_too_much_is_refused(monkeypatch) -> None:
    from lumina.data.decode import audio

    monkeypatch.setattr(audio, "MAX_AUDIO_VALUES", 7000)
    for read in (probe, lambda members: decode_audio(members, 16000)):
        with pytest.raises(BadSampleError, match="audio of 8000 samples × 1 is larger than 7000"):
            read(written(tone(16000, 0.5), 16000))
    with pytest.raises(BadSampleError, match="audio at 48000 Hz is longer than 7000"):
        decode_audio(written(tone(16000, 0.4), 16000), 48000)
    with pytest.raises(ValueError, match="not 10"):
        decode_audio(written(tone(16000, 0.1), 16000), 10)


def test_what_is_no_audio_is_refused() -> None:
    with pytest.raises(BadSampleError, match="png is no audio"):
        decode_audio({"png": b""}, 16000)
    aiff = io.BytesIO()
    soundfile.write(aiff, tone(16000, 0.1), 16000, format="AIFF")
    for data, message in (
        (b"", "does not decode"),
        (bytes(999), "does not decode"),
        (aiff.getvalue(), "audio is AIFF"),
    ):
        for read in (probe, lambda members: decode_audio(members, 16000)):
            with pytest.raises(BadSampleError, match=message):
                read({"wav": data})


@pytest.mark.parametrize("extension", FORMS)
def test_damaged_audio_is_a_bad_sample_and_nothing_else(extension: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 6000).astype(np.float32)
    good, rng, reasons = written(noise, 16000, extension)[extension], np.random.default_rng(1), []
    for length in (1, 30, len(good) // 3, len(good) // 2, len(good) * 4 // 5):
        with pytest.raises(BadSampleError) as caught:
            decode_audio({extension: good[:length]}, 16000)
        reasons.append(str(caught.value))
    for _ in range(100):
        data = bytearray(good)
        start = int(rng.integers(len(good) if rng.integers(2) else 60))
        if rng.integers(2):
            data[start] ^= 1 << int(rng.integers(8))
        else:
            data[start : start + 100] = bytes(len(data[start : start + 100]))
        for read in (probe, lambda members: decode_audio(members, 22050)):
            try:
                read({extension: bytes(data)})
            except BadSampleError as error:
                reasons.append(str(error))
    assert len(reasons) > 10
    assert not any("\n" in reason for reason in reasons)
