"""The folders that a pipeline opens: runs, checkpoints, inference folders and public ones."""

from pathlib import Path

from lumina.checkpoint.load import Checkpoint, latest_checkpoint, model_config
from lumina.checkpoint.manifest import EMA, MANIFEST, WEIGHTS
from lumina.checkpoint.sources import PUBLIC_VAE, public_trained, source_of
from lumina.config.schema import FlowConfig, TextConfig, TrainedConfig, VaeConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import build, load_pretrained, read_config
from lumina.model.public import read_arguments

Opened = tuple[FlagDiT, FlowConfig, TextConfig | None, VaeConfig, TrainedConfig | None]


def open_folder(directory: Path, weights: str) -> Opened:
    """Model, flow, text encoder, autoencoder and training of a folder, as its files say; None where they do not.

    Raises:
        ValueError: for a folder that is none of these, or that cannot be read.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; give a run, a checkpoint or an inference folder")
    if (directory / MANIFEST).is_file():
        return _open_checkpoint(Checkpoint(directory), weights)
    checkpoint = latest_checkpoint(directory)
    if checkpoint is not None:
        return _open_checkpoint(checkpoint, weights)
    if (directory / "checkpoints").is_dir() or (directory / "config.yaml").is_file():
        raise ValueError(f"{directory} is a run without a complete checkpoint yet; train it further")
    model = load_pretrained(directory, None, weights)
    if not (directory / "config.json").is_file():  # public weights, trained with the SD autoencoder
        return model, FlowConfig(), None, PUBLIC_VAE, public_trained(read_arguments(directory))
    config = read_config(directory)
    try:
        flow = FlowConfig.model_validate(config.get("flow", {}))
        own_text = TextConfig.model_validate(config["text"]) if "text" in config else None
        trained = TrainedConfig.model_validate(config["trained"]) if "trained" in config else None
        return model, flow, own_text, VaeConfig.model_validate(config.get("vae", {})), trained
    except ValueError as error:
        raise ValueError(f"{directory}/config.json: {str(error).splitlines()[0]}") from error


def _open_checkpoint(checkpoint: Checkpoint, weights: str) -> Opened:
    config = checkpoint.config
    kind = EMA if weights == "ema" else WEIGHTS
    source = source_of(checkpoint)  # which merges adapters, where the run trained those
    state = {name: source.read(kind, name) for name in source.tensors.get(kind, {})}
    model = build(model_config(config), state, str(checkpoint.directory))
    return model, config.flow, config.text, config.vae, config.data.trained_by(checkpoint.manifest.step)
