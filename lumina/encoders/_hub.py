"""What loading from the Hugging Face hub or a folder has in common: quiet logs and readable failures."""

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def reading(key: str, name: str, what: str, library: ModuleType) -> Iterator[None]:
    """Keeps `library` (transformers or diffusers) quiet and turns its failures into one sentence.

    `key` is the setting that names the model, `name` its value, `what` the thing that is read, for people.
    """
    from safetensors import SafetensorError

    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    log.set_verbosity(logging.CRITICAL)  # what goes wrong is raised, once
    log.disable_progress_bar()  # of reading weights; a download still shows its own
    hub.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(_sentence(key, name, what, error)) from error
    finally:
        log.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            log.enable_progress_bar()


def _sentence(key: str, name: str, what: str, error: BaseException) -> str:
    kinds = set()
    link: BaseException | None = error
    while link is not None:
        kinds.add(type(link).__name__)
        link = link.__cause__ or link.__context__
    folder = Path(name).expanduser()
    told = " ".join(str(error).split())
    if "custom code" in told or "trust_remote_code" in told:
        return f"{key}: {name} brings its own code, which is never run here; give a model that the library itself knows"
    if "mismatch" in told:
        return f"{key}: the weights of {name} have other shapes than its config.json says; download it again"
    if folder.is_dir():
        return f"{key}: the folder {name} holds no readable {what} ({_first(told) or type(error).__name__})"
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return f"{key}: there is no folder {name}; give a folder with a {what}, or a hub name such as owner/model"
    if "GatedRepoError" in kinds:
        return (
            f"{key}: {name} is gated; accept its licence at https://huggingface.co/{name} and run `hf auth login`, "
            "or download it on a machine with access and give the folder"
        )
    if "HFValidationError" in kinds:
        return f"{key}: {name!r} is neither a folder nor a hub name; give a folder with a {what}, or owner/model"
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        return f"{key}: the hub has no model {name} that you may see; check the spelling, or run `hf auth login` first"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout"}:
        return (
            f"{key}: {name} is not on this machine and the hub cannot be reached from it; download it on a machine "
            "with access (`hf download`) and give the folder"
        )
    return f"{key}: the {what} of {name} could not be read ({_first(told) or type(error).__name__})"


def _first(told: str) -> str:
    """The first sentence of a library's message, for theirs run over paragraphs."""
    return told.split(". ")[0].rstrip(".:")[:200]


def check_complete(key: str, name: str, report: dict, allowed: str | None = None) -> None:
    """Raises ValueError where weights were missing or misshapen: the libraries fill those with random numbers."""
    missing = [weight for weight in report["missing_keys"] if not (allowed and allowed in weight)]
    wrong = missing + [weight[0] for weight in report.get("mismatched_keys") or ()]
    if wrong:
        raise ValueError(
            f"{key}: {name} lacks weights that its config.json promises ({len(wrong)}, such as {sorted(wrong)[0]}); "
            "download it again"
        )
