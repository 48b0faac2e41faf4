"""Public sizes of Flag-DiT (arXiv 2405.05945, table 1; the public checkpoints)."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "600m": {"dim": 1536, "n_layers": 16, "n_heads": 32},
    "3b": {"dim": 3072, "n_layers": 32, "n_heads": 32},
    # The public "5B" is the 3B's width with the text branch; the name is kept for those who look for it.
    "5b": {"dim": 3072, "n_layers": 32, "n_heads": 32},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32},
}
