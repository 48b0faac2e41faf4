"""What the tests of conversions share: small models with random values everywhere, and folders that hold them."""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lumina.checkpoint.convert import Converted, Request, convert
from lumina.checkpoint.load import Checkpoint, latest_checkpoint
from lumina.checkpoint.save import Piece, SaveState
from lumina.config.load import validate
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from tests.parallel.runs import tiny_config
from tests.unit.checkpoints import save

REFERENCE = Path(__file__).parents[1] / "fixtures" / "flag_dit_tiny.safetensors"
OUTPUT_TOLERANCE = 2e-5
STEP, OPTIMIZER_STEPS = 7, 6
KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


def random_state(config: FlagDiTConfig, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in FlagDiT(config).state_dict().items()}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def write_run(folder: Path, **changes) -> dict[str, dict[str, torch.Tensor]]:
    """A run with a checkpoint of random values, as training writes it; returns them by kind."""
    config = validate(tiny_config(folder, folder.parent / "shards", **changes), "test")
    sizes = FlagDiTConfig.from_dict(config.model)
    values = {kind: random_state(sizes, seed) for seed, kind in enumerate(KINDS)}
    for kind in KINDS[2:]:
        values[kind].pop("pad_token", None)
    pieces = [
        Piece(kind, name, tuple(value.shape), 0, value.reshape(-1))
        for kind, held in values.items()
        for name, value in held.items()
    ]
    data = {"packs": 3, "index_hash": "0" * 64, "epoch": 0, "window": 1, "lanes": []}
    save(folder, config, pieces=pieces, state=SaveState(STEP, OPTIMIZER_STEPS, data=data, model=sizes.to_dict()))
    return values


def to(source: Path, destination: Path, target: str, **options) -> Converted:
    return convert(Request(source=source, destination=destination, to=target, **options))


def tensors_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of a run's newest checkpoint, by kind."""
    checkpoint: Checkpoint = latest_checkpoint(run)
    return {kind: checkpoint.state_dict(kind) for kind in checkpoint.manifest.tensors}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and every bit."""
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if found[name].dtype != value.dtype] == []
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def reference_state() -> dict[str, torch.Tensor]:
    return {key.removeprefix("weights/"): v for key, v in load_file(REFERENCE).items() if key.startswith("weights/")}


def reference_config() -> FlagDiTConfig:
    with safe_open(REFERENCE, framework="pt") as file:
        return FlagDiTConfig.from_dict(json.loads(file.metadata()["config"]))


def assert_reference_outputs(model: FlagDiT, tolerance: float = OUTPUT_TOLERANCE) -> None:
    vectors = load_file(REFERENCE)
    with torch.no_grad():
        out = model(vectors["in/batch"], vectors["in/t"], vectors["in/cap_feats"], vectors["in/cap_mask"])
    torch.testing.assert_close(out, vectors["out/batch"], atol=tolerance, rtol=0)


def write_public(folder: Path, state: dict[str, torch.Tensor], name="consolidated.00-of-01", suffix="pth", **arguments):
    """As the public trainer writes: `model_args.pth` is a pickled Namespace."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    told = {"model": "DiT_Llama_Tiny_patch2", "qk_norm": True, "norm_eps": 1e-5, "lr": 1e-4, "cache_data": None}
    torch.save(argparse.Namespace(**told | arguments), folder / "model_args.pth")
    return folder


def write_config(path: Path, **changes) -> Path:
    """A configuration file of a small run, as JSON, which is YAML."""
    path.write_text(json.dumps(tiny_config(path.parent / "run", path.parent / "shards", **changes)))
    return path
