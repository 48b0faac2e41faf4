"""What every rank has of the environment of whoever launched it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

# By prefix. No keys and no passwords: nothing on the way to another host is hidden.
_PASSED = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "PYTORCH_", "OMP_", "MKL_", "KMP_", "TRITON_", "LUMINA_", "DS_"),
    *("CUDA_DEVICE_", "CUDA_LAUNCH_", "PYTHON", "LD_LIBRARY_PATH", "TOKENIZERS_", "HF_HOME", "HF_HUB_OFFLINE", "TQDM_"),
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "NO_COLOR"),
)
_FILE = ".deepspeed_env"


def passed_on(environment: Mapping[str, str], names: Sequence[str], *folders: Path) -> dict[str, str]:
    """Variables that concern a run, those of `names`, and the lines NAME=VALUE of DeepSpeed's file in a folder.

    Args:
        environment: of this process.
        names: further ones, which must be set.
        folders: the first that has a `.deepspeed_env` counts.

    Raises:
        ValueError: for a name that is not set, and a line that says something else.
    """
    if missing := [name for name in names if name not in environment]:
        raise ValueError(f"--env {missing[0]}: it is not set here; set it, or leave it out")
    passed = {name: value for name, value in environment.items() if name in names or name.startswith(_PASSED)}
    for path in (folder / _FILE for folder in folders):
        if path.is_file():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    name, equals, value = line.strip().partition("=")
                    if not equals or not name.isidentifier():
                        raise ValueError(f"{path}, line {number}: {line.strip()!r} is not of the form NAME=VALUE")
                    passed[name] = value.strip("\"'")
            break
    return passed
