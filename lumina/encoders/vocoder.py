"""Spectrograms to sound by a neural vocoder, from a folder."""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from lumina.encoders._hub import check_complete, reading
from lumina.encoders.speech import HOP, MELS, SAMPLE_RATE

_KEY = "--vocoder"


class Vocoder:
    """A HiFi-GAN generator as transformers saves it (`SpeechT5HifiGan`), trained on `mel_spectrogram`'s spectrograms.

    Rate, step and bands are read from its config.json and checked. That its training took natural logarithms of mel
    amplitudes from 0 to 8000 Hz, as HiFi-GAN's own does, no config says.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        """Opens it; nothing is downloaded, and no code is run that is in the files.

        Raises:
            ValueError: for no such folder, one that holds no whole vocoder, or one of other spectrograms.
        """
        import transformers

        if not Path(folder).is_dir():
            raise ValueError(f"{_KEY}: there is no folder {folder}; a vocoder is a folder on this machine")
        with reading(_KEY, str(folder), "SpeechT5HifiGan vocoder", transformers):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type != "speecht5_hifigan":
            raise ValueError(f"{_KEY}: {folder} holds a {config.model_type}, not a HiFi-GAN (speecht5_hifigan)")
        for what, found, wanted in (
            ("mel bands", config.model_in_dim, MELS),
            ("samples a second", config.sampling_rate, SAMPLE_RATE),
            ("samples a column", math.prod(config.upsample_rates), HOP),
        ):
            if found != wanted:
                raise ValueError(f"{_KEY}: {folder} has {found:,} {what}; the spectrograms here have {wanted:,}")
        with reading(_KEY, str(folder), "SpeechT5HifiGan vocoder", transformers):
            model, report = transformers.SpeechT5HifiGan.from_pretrained(
                folder, config=config, local_files_only=True, weights_only=True, output_loading_info=True
            )
        check_complete(_KEY, str(folder), report)
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, mel: Float[np.ndarray, "80 frames"]) -> Float[np.ndarray, "samples"]:
        """Sound in [-1, 1], float32, 256 samples a frame, of log amplitudes."""
        columns = torch.from_numpy(np.ascontiguousarray(mel.T, dtype=np.float32)).to(self._device)
        return self._model(columns).cpu().numpy()
