"""What `lumina sample` writes of spectrograms, listened to by another implementation."""

import json
import pickle
import wave
from dataclasses import replace

import librosa
import numpy as np
import pytest
import torch
from PIL import Image

from lumina import LuminaPipeline
from lumina.cli import main
from lumina.encoders.speech import denormalise, griffin_lim, normalised_mel
from lumina.encoders.vocoder import Vocoder
from lumina.inference.sound import columns_of, save_sound
from tests.unit.test_pipeline import TINY, write_folder

RATE = 22050


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        "speech": write_folder(root / "speech", replace(TINY, patch_size=4, frames=True)),
        "mixed": write_folder(root / "mixed", replace(TINY, patch_size=4, in_channels=3)),
    }


@pytest.fixture(scope="module")
def vocoders(tmp_path_factory):
    """Small ones of random weights; all but `right` are of other spectrograms."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    root = tmp_path_factory.mktemp("vocoders")
    right = {"model_in_dim": 80, "sampling_rate": RATE, "upsample_rates": [8, 8, 2, 2]}
    right |= {"upsample_kernel_sizes": [16, 16, 4, 4], "upsample_initial_channel": 16}
    right |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "initializer_range": 0.2}
    changes = {
        "right": {},
        "mels": {"model_in_dim": 64},
        "rate": {"sampling_rate": 16000},
        "step": {"upsample_rates": [8, 8, 2, 1]},
    }
    for name, change in changes.items():
        torch.manual_seed(0)
        model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**right | change))
        model.mean.fill_(-5.0)
        model.scale.fill_(2.0)
        model.save_pretrained(root / name)
    return root


def speak(folder, out, *options):
    words = ["sample", str(folder), "--prompt", "say the word two", "--out", str(out), "--steps", "2", *options]
    return main(words)


def heard(path):
    """Samples in [-1, 1] of a WAV of 16 bits, mono, 22,050 a second."""
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def librosas_mel(sound):
    """HiFi-GAN's spectrogram of a sound, by librosa, in logarithms."""
    padded = np.pad(sound, 384, mode="reflect")
    amplitudes = librosa.feature.melspectrogram(
        y=padded, sr=RATE, n_fft=1024, hop_length=256, center=False, power=1.0, n_mels=80, fmin=0, fmax=8000
    )
    return np.log(np.maximum(amplitudes, 1e-5))


def voice(seconds=0.7):
    """Harmonics of a tone that glides, louder in the middle."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * (120 * time + 60 * time**2)
    return sum(np.sin(k * phase) / k for k in range(1, 20)) * 0.2 * np.sin(np.pi * time / seconds) ** 2


def test_the_sound_has_the_spectrogram_it_was_made_of(tmp_path):
    values = normalised_mel(voice())
    save_sound(torch.from_numpy(values), tmp_path / "a.wav")
    sound = heard(tmp_path / "a.wav")
    assert len(sound) == values.shape[1] * 256
    wanted, found = denormalise(values), librosas_mel(sound)
    loud = wanted > wanted.max() - 5  # 43 dB
    error = np.abs(found - wanted)[loud].mean()
    assert loud.mean() > 0.3
    assert error < 0.25, "nepers; measured 0.19"
    # Upside down it would be far off.
    assert np.abs(found[::-1] - wanted)[loud].mean() > 1


def test_the_picture_has_low_bands_at_the_bottom(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(RATE // 2) / RATE)
    values = normalised_mel(tone)
    save_sound(torch.from_numpy(values), tmp_path / "a.wav")
    with Image.open(tmp_path / "a.png") as picture:
        levels = np.asarray(picture)
    assert levels.shape == values.shape
    assert levels.mean(1).argmax() > 70
    assert np.abs(levels[::-1] / 127.5 - 1 - values.clip(-1, 1)).max() <= 0.51 / 127.5


@pytest.mark.parametrize(
    ("seconds", "multiple", "columns"),
    [(1e-9, 4, 4), (1.0, 1, 87), (1.0, 4, 88), (1024 / RATE, 4, 4), (1025 / RATE, 4, 8)],
)
def test_seconds_are_columns(seconds, multiple, columns):
    assert columns_of(seconds, multiple) == columns


@pytest.mark.parametrize(("name", "channels"), [("speech", 1), ("mixed", 1)])
def test_seconds_from_the_command_line(folders, tmp_path, name, channels):
    out = tmp_path / "out"
    assert speak(folders[name], out, "--seconds", "0.1", "--count", "2", "--seed", "5") == 0
    records = json.loads((out / "samples.json").read_text())
    assert [record["file"] for record in records] == ["000000.wav", "000001.wav"]
    assert {"seconds": 0.1, "height": 80, "width": 12, "channels": 1, "format": "wav"}.items() <= records[0][
        "settings"
    ].items()
    names = ["000000.png", "000000.wav", "000001.png", "000001.wav", "samples.json", "sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    pipeline = LuminaPipeline.from_pretrained(folders[name], device="cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    prompts = ["say the word two"] * 2
    latents = pipeline(prompts, 80, 12, 1, 2, generator=generators, channels=channels).latents
    for record, sample in zip(records, latents, strict=True):
        values = sample[0, 0].clamp(-1, 1).numpy()
        sound = heard(out / record["file"])
        assert len(sound) == 2205
        whole = griffin_lim(denormalise(values))
        expected = whole[:2205] / max(1.0, np.abs(whole[:2205]).max())
        assert np.abs(sound - expected).max() <= 1e-3
        with Image.open((out / record["file"]).with_suffix(".png")) as picture:
            assert np.abs(np.asarray(picture)[::-1] - (values + 1) * 127.5).max() <= 0.51


def test_width_in_columns(folders, tmp_path):
    assert speak(folders["speech"], tmp_path / "out", "--format", "wav", "--width", "8") == 0
    assert len(heard(tmp_path / "out" / "000000.wav")) == 8 * 256
    assert speak(folders["speech"], tmp_path / "picture", "--height", "80", "--width", "8") == 0
    assert (tmp_path / "picture" / "000000.png").is_file()
    assert not (tmp_path / "picture" / "000000.wav").exists()


def test_a_vocoder_makes_the_sound(folders, vocoders, tmp_path):
    from transformers import SpeechT5HifiGan

    folder = vocoders / "right"
    assert speak(folders["speech"], tmp_path / "out", "--vocoder", str(folder), "--width", "8", "--seed", "5") == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())[0]
    assert (record["file"], record["settings"]["vocoder"]) == ("000000.wav", str(folder))
    pipeline = LuminaPipeline.from_pretrained(folders["speech"], device="cpu")
    latents = pipeline("say the word two", 80, 8, 1, 2, generator=torch.Generator().manual_seed(5)).latents
    # Log amplitudes, by hand: -1 is ln 1e-5 and 1 is 2.
    mel = (latents[0, 0, 0].clamp(-1, 1) + 1) / 2 * (2 - np.log(1e-5)) + np.log(1e-5)
    with torch.no_grad():
        expected = SpeechT5HifiGan.from_pretrained(folder)(mel.T.float()).numpy()
    sound = heard(tmp_path / "out" / "000000.wav")
    assert np.abs(sound).max() > 0.01
    assert np.abs(sound - expected).max() <= 1e-3
    plain = tmp_path / "plain"
    assert speak(folders["speech"], plain, "--format", "wav", "--width", "8", "--seed", "5") == 0
    assert np.abs(heard(plain / "000000.wav") - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mels", "has 64 mel bands; the spectrograms here have 80"),
        ("rate", "has 16,000 samples a second; the spectrograms here have 22,050"),
        ("step", "has 128 samples a column; the spectrograms here have 256"),
        ("none", "there is no folder .*none; a vocoder is a folder on this machine"),
    ],
)
def test_vocoders_of_other_spectrograms(vocoders, name, words):
    with pytest.raises(ValueError, match=rf"^--vocoder: .*{words}"):
        Vocoder(vocoders / name)


def test_a_vocoder_that_is_not_whole(vocoders, tmp_path):
    with pytest.raises(ValueError, match=r"^--vocoder: the folder .* holds no readable SpeechT5HifiGan vocoder"):
        Vocoder(tmp_path)
    (tmp_path / "config.json").write_text((vocoders / "right" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"^--vocoder: "):
        Vocoder(tmp_path)
    config = json.loads((vocoders / "right" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "vits"}))
    with pytest.raises(ValueError, match="holds a vits, not a HiFi-GAN"):
        Vocoder(tmp_path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_vocoder_is_run(vocoders, tmp_path):
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "config.json").write_text((vocoders / "right" / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=r"^--vocoder: "):
        Vocoder(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("speech", ["--seconds", "1", "--width", "80"], "--seconds and --width both say how long"),
        ("speech", ["--seconds", "1", "--height", "64"], "--height is 64, but sound is made of 80 rows"),
        ("speech", ["--format", "wav"], "say how long by --seconds S, or by --width"),
        ("speech", ["--seconds", "0"], "--seconds is 0; it must be more than 0"),
        ("speech", ["--seconds", "nan"], "--seconds is nan"),
        ("speech", ["--seconds", "inf"], "--seconds is inf"),
        ("speech", ["--seconds", "1", "--frames", "2"], "--format wav: sound has one frame, not 2"),
        ("speech", ["--seconds", "1", "--fps", "2"], "--fps is of mp4 and gif"),
        ("speech", ["--format", "wav", "--width", "10"], "height 80 and width 10 must be multiples of 4"),
        ("mixed", ["--seconds", "1", "--channels", "3"], "spectrograms have one channel; samples of 3 make no sound"),
    ],
)
def test_refusals(folders, tmp_path, capsys, name, options, words):
    assert speak(folders[name], tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_librosa(folders, vocoders, tmp_path, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "librosa" else find(name, *rest)
    )
    assert speak(folders["speech"], tmp_path / "a", "--seconds", "0.1") == 2
    assert "pip install 'lumina-t2x[speech]'), or a --vocoder folder" in capsys.readouterr().err
    assert speak(folders["speech"], tmp_path / "b", "--seconds", "0.1", "--vocoder", str(vocoders / "right")) == 0
