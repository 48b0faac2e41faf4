"""Spectrograms against librosa's, sound made of them, and the spoken words of espeak-ng."""

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch

from lumina.data.decode import decode_audio, verify
from lumina.data.index import Index
from lumina.data.recipes import speech as recipe
from lumina.data.recipes.digits import WORDS
from lumina.data.recipes.speech import HELD_VOICES, HELD_WORDINGS, VOICES, WORDINGS, held_prompts, write_speech
from lumina.data.shard_index import KINDS
from lumina.data.workers import PackDecoder, Request
from lumina.encoders.speech import (
    denormalise,
    griffin_lim,
    mel_filters,
    mel_spectrogram,
    normalise,
    normalised_mel,
    write_wav,
)

RATE = 22050
speaks = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@pytest.fixture
def vowel() -> np.ndarray:
    """Half a second of harmonics of 120 to 180 Hz under three formants, in the middle of silence."""
    time = np.arange(RATE // 2) / RATE
    phase = 2 * np.pi * (120 * time + 60 * time**2)
    sound = np.zeros_like(time)
    for harmonic in range(1, 40):
        strength = sum(1 / (1 + ((harmonic * 150 - formant) / 120) ** 2) for formant in (700, 1200, 2600))
        sound += strength * np.cos(harmonic * phase)
    sound *= np.sin(np.pi * time / time[-1]) ** 2 / np.abs(sound).max()
    return np.pad(sound, 4096)[: 256 * 72].astype(np.float32)


def test_spectrograms_are_those_of_librosa(vowel: np.ndarray) -> None:
    filters = librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    np.testing.assert_allclose(mel_filters(), filters, atol=1e-8)
    noise = np.random.default_rng(0).normal(0, 0.3, 9000).astype(np.float32)
    for sound in (vowel, noise, noise[:385]):
        mel = mel_spectrogram(sound)
        theirs = librosa.feature.melspectrogram(
            y=np.pad(sound.astype(float), 384, mode="reflect"),
            sr=RATE,
            n_fft=1024,
            hop_length=256,
            n_mels=80,
            fmin=0,
            fmax=8000,
            power=1,
            center=False,
        )
        assert mel.shape == (80, len(sound) // 256)
        assert mel.dtype == np.float32
        np.testing.assert_allclose(mel, np.log(np.maximum(theirs, 1e-5)), atol=2e-5)
    assert mel_spectrogram(np.zeros(512, np.float32)).max() == pytest.approx(np.log(1e-5))


def test_a_tone_lies_in_its_band() -> None:
    centres = librosa.mel_frequencies(82, fmin=0, fmax=8000)[1:-1]
    for band in (10, 40, 75):
        tone = 0.5 * np.sin(2 * np.pi * centres[band] * np.arange(8192) / RATE).astype(np.float32)
        assert (mel_spectrogram(tone).argmax(0) == band).all()


def test_the_range_of_values() -> None:
    mel = np.array([np.log(1e-5), 2.0, (np.log(1e-5) + 2) / 2], np.float32)
    np.testing.assert_allclose(normalise(mel), [-1, 1, 0], atol=1e-6)
    values = torch.linspace(-1.5, 1.5, 7)
    torch.testing.assert_close(normalise(denormalise(values)), values)
    assert denormalise(torch.tensor(1.0)) == pytest.approx(2.0)
    tone = np.sin(2 * np.pi * 437 * np.arange(8192) / RATE).astype(np.float32)
    assert 0.8 < normalised_mel(tone).max() < 1.2, "full scale is about 1"


def test_sound_made_of_a_spectrogram_has_that_spectrogram(vowel: np.ndarray) -> None:
    mel = mel_spectrogram(vowel)
    sound = griffin_lim(mel)
    assert sound.shape == vowel.shape
    assert sound.dtype == np.float32
    error = np.abs(mel_spectrogram(sound) - mel)
    loud = mel > -5
    assert loud.mean() > 0.2
    assert error[loud].mean() < 0.22, "nepers; measured 0.17, and 0.10 on spoken words"
    # A frame's shift, 256 samples, would move the middle of what is heard.
    where = np.arange(len(vowel))
    middles = [(where * part**2).sum() / (part**2).sum() for part in (vowel.astype(float), sound.astype(float))]
    assert abs(middles[0] - middles[1]) < 60
    np.testing.assert_array_equal(griffin_lim(mel), sound)
    assert not np.array_equal(griffin_lim(mel, seed=1), sound)


def test_sound_files(tmp_path: Path) -> None:
    sound = np.array([0, 0.5, -1, 1, 0.25], np.float32)
    write_wav(tmp_path / "a.wav", sound)
    write_wav(tmp_path / "b.wav", 4 * sound)
    write_wav(tmp_path / "c.wav", sound / 4)
    for name, loudness in (("a", 1), ("b", 1), ("c", 0.25)):
        with wave.open(str(tmp_path / f"{name}.wav")) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
            levels = np.frombuffer(file.readframes(9), "<i2")
        np.testing.assert_allclose(levels, np.array([0, 16383.5, -32767, 32767, 8191.75]) * loudness, atol=0.51)


def test_what_is_no_sound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="more than 384 samples of sound, not 384"):
        mel_spectrogram(np.zeros(384, np.float32))
    nan = np.full((80, 9), np.nan, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        mel_spectrogram(nan.ravel())
    with pytest.raises(ValueError, match="not finite"):
        griffin_lim(nan)
    with pytest.raises(ValueError, match="not finite"):
        write_wav(tmp_path / "a.wav", nan.ravel())
    with pytest.raises(ValueError, match=r"none/a\.wav cannot be written"):
        write_wav(tmp_path / "none" / "a.wav", np.zeros(3, np.float32))
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(ValueError, match=r"pip install 'lumina-t2x\[speech\]'"):
        griffin_lim(np.zeros((80, 9), np.float32))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech") / "shards"
    summary = write_speech(folder, normalised_mel, count=50, seed=2, workers=1)
    assert (summary.samples, summary.shards) == (50, 1)
    return folder


def spoken(word: str, fields: dict) -> np.ndarray:
    """What espeak-ng says on its standard output, behind the header."""
    settings = ["-v", fields["voice"], "-s", str(fields["words_a_minute"]), "-p", str(fields["pitch"])]
    output = subprocess.run(["espeak-ng", *settings, "--stdout", word], capture_output=True, check=True).stdout
    return np.frombuffer(output[44 : len(output) // 2 * 2], "<i2").astype(float)


@speaks
def test_words_are_what_espeak_says(words: Path) -> None:
    index = Index.open([words])
    assert set(index.column("kind").tolist()) == {KINDS.index("latent")}
    assert set(index.column("height").tolist()) == {80}
    assert set(index.column("width").tolist()) == {48}
    assert set(index.column("frames").tolist()) == {1}
    assert index.column("label").tolist() == 5 * list(range(10))
    decode = PackDecoder(index.reader, 1)
    voices, speeds = set(), {"fast": [], "slow": []}
    for number in range(50):
        members = index.read(number)
        verify(members)
        (raw,) = decode([Request(number, None)])
        mean, deviation = raw.latent[0]
        assert raw.latent.shape == (1, 2, 80, 48)
        assert not deviation.any()
        (sound,) = decode_audio({"wav": members["wav"]}, RATE)
        assert len(sound) == 48 * 256
        np.testing.assert_allclose(mean, normalised_mel(sound), atol=1e-3)
        said = re.findall("[a-z]+|[0-9]", raw.caption)
        assert [word for word in said if word in WORDS or word.isdigit()][-1] in (WORDS[raw.label], str(raw.label))
        fields = json.loads(members["json"])
        voices.add(fields["voice"])
        speeds["fast" if fields["words_a_minute"] > 260 else "slow"].append(fields["seconds"])
        # The word lasts as long as is said, then there is silence, whose spectrogram is -1.
        length = round(fields["seconds"] * RATE)
        assert np.abs(sound).max() == pytest.approx(0.9, abs=1e-4)
        loud = np.flatnonzero(np.abs(sound) > 0.0091)
        assert loud[0] <= 110
        assert length - 112 <= loud[-1] < length
        assert not sound[length:].any()
        assert (mean[:, -(-length // 256) + 2 :] == -1).all()
        if number % 10 == 7:
            whole = spoken(WORDS[raw.label], fields)
            start = np.correlate(whole, sound[:length].astype(float), "valid").argmax()
            part = whole[start : start + length] * (0.9 / np.abs(whole).max())
            np.testing.assert_allclose(sound[:length], part, atol=1e-4)
            assert np.abs(whole[:start]).max(initial=0) <= 0.0101 * np.abs(whole).max()
            assert np.abs(whole[start + length :]).max(initial=0) <= 0.0101 * np.abs(whole).max()
    assert len(voices) > 15
    assert voices < set(VOICES)
    assert np.mean(speeds["fast"]) < np.mean(speeds["slow"])


@speaks
def test_voices_are_voices() -> None:
    # espeak-ng takes what it does not know for its default voice, in silence.
    settings = {"words_a_minute": 220, "pitch": 50}
    said = {voice: spoken("three", settings | {"voice": voice}).tobytes() for voice in (*VOICES, *HELD_VOICES)}
    assert len(set(said.values())) == len(said) == len(VOICES) + len(HELD_VOICES)
    accents, speakers = ({voice.split("+")[part] for voice in VOICES} for part in (0, 1))
    assert not accents & {voice.split("+")[0] for voice in HELD_VOICES}
    assert not speakers & {voice.split("+")[1] for voice in HELD_VOICES}


@speaks
def test_a_sample_is_a_function_of_seed_and_number(words: Path, tmp_path: Path) -> None:
    index = Index.open([words])
    make = recipe._Recipe(normalised_mel, VOICES, 48, 2, shutil.which("espeak-ng"))
    assert pickle.dumps(make), "it can be sent to another process"
    for number in (3, 41):
        sample = make(number)
        stored = index.read(number)
        assert json.loads(stored["json"]) == sample["json"]
        assert [stored[name] for name in ("wav", "latent.npy")] == [sample[name] for name in ("wav", "latent.npy")]
    write_speech(tmp_path / "held", normalised_mel, count=6, seed=2, held=True, width=64, workers=1)
    held = Index.open([tmp_path / "held"])
    assert {json.loads(held.read(n)["json"])["voice"] for n in range(6)} <= set(HELD_VOICES)
    assert np.load(io.BytesIO(held.read(0)["latent.npy"])).shape == (1, 1, 2, 80, 64)


def test_held_prompts_are_new_sentences() -> None:
    trained = {recipe.caption_for(7, wording) for wording in WORDINGS}
    assert len(trained) == len(WORDINGS) > 900
    assert len(set(held_prompts(7))) == len(HELD_WORDINGS) == 4
    assert not trained.intersection(held_prompts(7))
    assert all("seven" in prompt or "7" in prompt for prompt in held_prompts(7))
    with pytest.raises(ValueError, match="from 0 to 9, not -1"):
        held_prompts(-1)


@speaks
def test_a_word_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'zero' by the voice \S+ lasts 0\.\d\d s, and 9 columns hold 0\.10 s; take"):
        write_speech(tmp_path / "out", normalised_mel, width=9, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_refused_without_espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get install espeak-ng"):
        write_speech(tmp_path / "out", normalised_mel)
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\necho 'no voice data' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match=r"does not speak with the voice \S+ \(no voice data\)"):
        write_speech(tmp_path / "out", normalised_mel, workers=1)
    with pytest.raises(ValueError, match="width must be at least 1, not 0"):
        write_speech(tmp_path / "out", normalised_mel, width=0)
    assert [path.name for path in tmp_path.iterdir()] == ["espeak-ng"]
