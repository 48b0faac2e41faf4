"""What a run that goes on must have in common with what it was."""

from lumina.checkpoint.load import Checkpoint, model_config
from lumina.config.schema import Config, LoraConfig
from lumina.data.plan import DataState


def lanes_of(config: Config, state: DataState | None) -> int | None:
    """The lanes of the run that goes on, whatever its global batch is now."""
    if state is None:
        return None
    if config.data.lanes not in (None, len(state.lanes)):
        raise ValueError(
            f"data.lanes={config.data.lanes}, but {config.run.dir} has {len(state.lanes)}, which a run keeps; "
            f"set data.lanes={len(state.lanes)}, or leave it out"
        )
    return len(state.lanes)


def check_same_run(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse, by `ValueError`, to resume what would silently be another run."""
    now = _identity(config)
    for key, before in _identity(checkpoint.config).items():
        if now.get(key) != before:
            raise ValueError(
                f"{key}={now.get(key)}, but {config.run.dir} was trained with {before}; "
                f"set it back to go on with that run, or name another run.dir"
            )


def _identity(config: Config) -> dict[str, object]:
    """What cannot change without making another run of it; rates, lengths and layouts can."""
    sections = {
        "model": model_config(config).to_dict(),
        "flow": config.flow.model_dump(include={"path", "prediction"}),
        "text": config.text.model_dump(exclude={"dtype"}) if config.text else {},
        "vae": config.vae.model_dump(exclude={"dtype"}),
    }
    # Of a run that trains weights all three are None; what the adapters are beside is in the run's own folder.
    sections["lora"] = config.lora.model_dump() if config.lora else dict.fromkeys(LoraConfig.model_fields)
    named = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {"run.seed": config.run.seed, **named}
