"""Small runs to simulate."""

from lumina.benchmark.simulation import Simulated, simulate
from lumina.config.load import with_overrides
from lumina.config.schema import Config
from lumina.model.config import FlagDiTConfig

TEXT = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "in_channels": 4, "cap_feat_dim": 32}
LABEL = {name: value for name, value in TEXT.items() if name != "cap_feat_dim"} | {"num_classes": 3}
ONE, TWO = {"n_layers": 1}, {"n_layers": 2}
SHAPES, CAPTIONS = [(1, 4, 10, 12), (1, 4, 6, 10)], [5, 3]  # 35 and 18 tokens with text: no even stretches


def config_of(model: dict, layout: dict, precision: str = "fp32", packs: int = 8) -> Config:
    tree = {
        "run": {"dir": "none"},
        "model": model,
        "vae": {"model": "none"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1, "global_batch_packs": packs},
        "precision": precision,
        "parallel": {"zero_stage": 0 if precision == "fp32" else 1} | layout,
    }
    return with_overrides(tree, [], "test")


def simulated(config: Config, world: int, rank: int, device: str = "cpu") -> Simulated:
    sizes = FlagDiTConfig.from_dict(config.model)
    captions = CAPTIONS if sizes.text_conditional else []
    return simulate(config, sizes, world, rank, SHAPES, captions, device=device)
