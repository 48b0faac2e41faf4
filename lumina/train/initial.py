"""What a run starts from: weights that are drawn, or those of another model."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import EMA, WEIGHTS
from lumina.checkpoint.sources import open_source
from lumina.config.schema import TrainConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import check_fit, check_recorded, listed, misfits
from lumina.parallel.fragments import Fragment


class Start:
    """The model at `train.init_from`, opened: laid over one that was drawn, and the average that goes on from it."""

    def __init__(self, train: TrainConfig, model: FlagDiT):
        """
        Args:
            train: with `init_from`.
            model: drawn; its weights become those of the other model, where it has them.

        Raises:
            ValueError: for a folder that holds no model, what is asked for and not there, and whatever does not fit
                and is not allowed to be missing.
        """
        source = open_source(Path(train.init_from), model.config)
        check_recorded(source.files())  # a checkpoint of ours checks what is read of it by itself
        self.source, self._carry_ema = source, train.init_ema
        kind = {"model": WEIGHTS, "ema": EMA}[train.init_weights]
        if kind not in source.tensors and len({WEIGHTS, EMA} & source.tensors.keys()) == 1:
            kind = next(iter({WEIGHTS, EMA} & source.tensors.keys()))  # a folder of one kind of weights
        for wanted, key in ((kind, "init_weights"), *([(EMA, "init_ema")] if train.init_ema else [])):
            if wanted not in source.tensors:
                raise ValueError(f"train.{key} asks for the {wanted} weights of {train.init_from}, which has none")
        check_variants(source.model, model.config, train.init_from)
        found = {name: stored.shape for name, stored in source.tensors[kind].items()}
        drawn, left = drawn_and_left(
            model, found, train.allow_missing, train.init_from, new_text_branch=train.new_text_branch
        )
        self.kind, self.drawn = kind, list(drawn)
        self._taken = [name for name, _ in model.named_parameters() if name not in drawn]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in drawn:
                    parameter.copy_(source.read(kind, name))
        self.said = [f"starting from the {kind} weights of {train.init_from}, step {source.step}"]
        if "nextframe_token" not in found and "nextframe_token" in drawn:
            drawn.remove("nextframe_token")
            self.said.append("nextframe_token is drawn: models of images have none")
        if train.new_text_branch:
            branch = [name for name in drawn if _reads_captions(name)]
            drawn = [name for name in drawn if name not in branch]
            self.said.append(f"the text branch starts anew, its gates at zero: {named(branch)}")
        self.said += [f"drawn anew, as train.allow_missing lets it: {', '.join(drawn)}"] if drawn else []
        self.said += [f"left out, as train.allow_missing lets it: {', '.join(left)}"] if left else []

    def average(self, fragment: Fragment) -> Tensor | None:
        """Where the average of a fragment starts; None: at the weights."""
        if not self._carry_ema or fragment.name not in self._taken:
            return None
        return fragment.cut(self.source.read(EMA, fragment.name))


# All that reads captions, but for the bias of the pooled ones: that is a shift which every caption shares, and is kept.
_TEXT_BRANCH = (
    "cap_embedder.0.*",
    "cap_embedder.1.weight",
    "layers.*.attention_y_norm.weight",
    "layers.*.attention.w[kv]_y.weight",
    "layers.*.attention.ky_norm.*",
    "layers.*.attention.gate",
)


def _reads_captions(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in (*_TEXT_BRANCH, "cap_embedder.1.bias"))


def named(names: Sequence[str]) -> str:
    """In a sentence, the first of many."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def check_variants(theirs: FlagDiTConfig, ours: FlagDiTConfig, source: str) -> None:
    """Refuse, by `ValueError`, a model that differs in what shapes may not tell."""
    for field in ("n_heads", "patch_size", "norm_eps", "qk_norm"):
        if getattr(theirs, field) != getattr(ours, field):
            raise ValueError(
                f"model.{field} is {getattr(ours, field)}, and {getattr(theirs, field)} in train.init_from={source}"
            )


def drawn_and_left(
    model: FlagDiT,
    found: dict[str, tuple[int, ...]],
    patterns: Sequence[str],
    source: str,
    *,
    new_text_branch: bool = False,
) -> tuple[list[str], list[str]]:
    """Parameters that the source does not give, and tensors of it that the model does not take; all allowed.

    Args:
        found: shapes of the tensors of the source.
        source: what to call it.
        new_text_branch: whether what reads captions is drawn though the source has it.

    Raises:
        ValueError: for what is not allowed, and for patterns that nothing matches.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if new_text_branch and not model.config.text_conditional:
        raise ValueError("train.new_text_branch: this model is label-conditional and reads no captions; leave it out")
    anew = {n for n in expected if new_text_branch and any(fnmatchcase(n, pattern) for pattern in _TEXT_BRANCH)}

    def allowed(name: str) -> bool:
        # No model of images has a token between frames.
        of_frames = name == "nextframe_token" and name not in found
        return (
            of_frames
            or (new_text_branch and _reads_captions(name))
            or any(fnmatchcase(name, pattern) for pattern in patterns)
        )

    drawn = [name for name, shape in expected.items() if name in anew or found.get(name) != shape]
    left = [name for name in found if name not in expected]
    if problems := {name: problem for name, problem in misfits(expected, found).items() if not allowed(name)}:
        raise ValueError(
            f"train.init_from={source} does not fit the model: {listed(problems)}. {_why(model.config, found)}What may "
            "be drawn anew or left out is named by train.allow_missing, or --allow-missing"
        )
    unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in drawn + left)]
    if unused:
        raise ValueError(f"train.allow_missing: nothing that is missing or left over is called {', '.join(unused)}")
    return drawn, left


def _why(ours: FlagDiTConfig, found: dict[str, tuple[int, ...]]) -> str:
    """Which sizes of the source are others, where its tensors tell."""
    said = ""
    _, width = found.get("cap_embedder.1.weight", (None, None))
    if ours.text_conditional and width not in (None, ours.cap_feat_dim):
        said += (
            f"Its captions are {width} wide, and model.cap_feat_dim is {ours.cap_feat_dim}: "
            "train.new_text_branch=true starts anew what reads them. "
        )
    _, patch = found.get("x_embedder.weight", (None, None))
    if patch not in (None, ours.patch_size**2 * ours.in_channels):
        said += (
            f"Its latents have {patch // ours.patch_size**2} channels, and model.in_channels is {ours.in_channels}: "
            "x_embedder.weight and final_layer.linear.* would be drawn. "
        )
    return said


def unfilled_model(config: FlagDiTConfig, checkpoint: Checkpoint) -> FlagDiT:
    """A model for the engine to cut; what is trained is read after that, by each rank its own part."""
    with torch.device("meta"):
        model = FlagDiT(config)
    saved = {name: checkpoint.shape(WEIGHTS, name) for name in checkpoint.names(WEIGHTS)}
    check_fit({name: tuple(p.shape) for name, p in model.named_parameters()}, saved, str(checkpoint.directory))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(checkpoint.read(WEIGHTS, name).view_as(parameter))
    return model
