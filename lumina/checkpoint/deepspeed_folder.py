"""DeepSpeed's own checkpoint folders, put together by parameter without DeepSpeed.

`engine.save_checkpoint` writes `latest` (the name of a tag) and, in the tag's folder, `*_model_states.pt` (the working
weights, or under ZeRO 3 their names and shapes) and under ZeRO a `*_optim_states.pt` a data-parallel rank: fp32
masters and Adam's moments, flattened over parameters and cut between ranks.
"""

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina.checkpoint.deepspeed_layout import cut_groups, cut_parameters, owners_of, prefix, stretches_of
from lumina.checkpoint.manifest import MOMENTS, WEIGHTS
from lumina.checkpoint.sources import Source
from lumina.checkpoint.tensor_reader import PickleFiles, Stored, stored_of
from lumina.model.config import FlagDiTConfig
from lumina.model.inert import StandIn
from lumina.model.public import sizes_of

LATEST = "latest"
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""DeepSpeed's ZeroStageEnum, whose members some versions of Python 3.11 write by their names."""


def tag_folder(path: Path) -> Path | None:
    """The folder with the files of a DeepSpeed checkpoint: `path`, or the one that its `latest` names; else None.

    Raises:
        ValueError: where `latest` names a folder that is not there.
    """
    if any(path.glob("*_model_states.pt")):
        return path
    latest = path / LATEST
    if not latest.is_file() or latest.stat().st_size > 1000:
        return None
    tag = latest.read_text(errors="replace").strip()
    if not tag or Path(tag).name != tag or not any((path / tag).glob("*_model_states.pt")):
        raise ValueError(f"{latest} names {tag!r}, which is no folder with *_model_states.pt files beside it")
    return path / tag


_Part = tuple[Path, Tensor]
"""A file, and what of it: one of its tensors or a slice of one, on "meta"."""


class DeepSpeedSource(Source):
    """The masters, and Adam's moments, of a DeepSpeed checkpoint."""

    format = "deepspeed"

    def __init__(self, path: Path, config: FlagDiTConfig | None):
        """
        Raises:
            ValueError: for files that are missing, damaged, of several model-parallel ranks, or of another model.
        """
        super().__init__()
        self.path = path
        self._files = PickleFiles()
        self._model_files = _by_rank(path, "_model_states.pt")
        self._optimizer_files = _by_rank(path, "_optim_states.pt")
        state = self._model_state(0)
        self.step = int(state.get("global_steps", 0))
        self.software = {"deepspeed": str(state.get("ds_version", "unknown"))}
        self.tensors = {}
        self._parts: dict[str, dict[str, list[_Part]]] = {}
        if state.get("param_shapes") is None:
            self._open_unpartitioned(state)
        else:
            self._open_partitioned(state)
        shapes = {name: stored.shape for name, stored in self.tensors[WEIGHTS].items()}
        self.model = sizes_of(shapes, {}, path) if config is None else config

    def files(self) -> list[Path]:
        return [*self._model_files, *self._optimizer_files]

    def read(self, kind: str, name: str) -> Tensor:
        shape = self.tensors[kind][name].shape
        parts = [self._files.read(*part).view(-1) for part in self._parts[kind][name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[: prod(shape)].view(shape)

    def _hold(self, kind: str, name: str, shape: Sequence[int], parts: list[_Part]) -> None:
        """A tensor is the flat `parts` one after another; what is over is padding."""
        dtype = stored_of(parts[0][1], f"{parts[0][0]}: {kind}/{name}").dtype
        self.tensors.setdefault(kind, {})[name] = Stored(dtype, tuple(shape))
        self._parts.setdefault(kind, {})[name] = parts

    # ZeRO 1, 2 and 3.

    def _open_partitioned(self, state: dict[str, Any]) -> None:
        groups = [{name: tuple(shape) for name, shape in group.items()} for group in state["param_shapes"]]
        strip = prefix([name for group in groups for name in group], self.path)
        world = int(state.get("dp_world_size", len(self._optimizer_files)))
        if len(self._optimizer_files) != world:
            raise ValueError(
                f"{self.path} is not complete: of {world} *_optim_states.pt files, one a data-parallel rank, it has "
                f"{len(self._optimizer_files)}"
            )
        first = self._optimizer_state(0)
        paddings = first.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        stage = first.get("zero_stage")
        stage = stage.arguments[0] if isinstance(stage, StandIn) and stage.arguments else stage
        stage = _STAGES.get(stage, stage)
        self.training = {"zero_stage": stage or 1, "data_parallel": world}  # BF16_Optimizer, of ZeRO 1, does not say
        adam = self._adam(0)
        if adam["state"]:
            self.optimizer_steps = self._steps(adam, next(iter(adam["state"])), self._optimizer_files[0])
        for kind in (WEIGHTS, *(MOMENTS if adam["state"] else ())):
            flats = [self._flats(kind, rank) for rank in range(world)]
            sizes = [[flat.numel() for flat in of_rank] for of_rank in flats]
            try:
                plan = cut_parameters(groups, sizes) if stage == 3 else cut_groups(groups, sizes, paddings)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from error
            for name, shape, pieces in plan:
                parts = [
                    (self._optimizer_files[piece.rank], flats[piece.rank][piece.group][piece.start :][: piece.numel])
                    for piece in pieces
                ]
                self._hold(kind, name.removeprefix(strip), shape, parts)
        self._hold_frozen(state, strip, stage)

    def _hold_frozen(self, state: dict[str, Any], strip: str, stage: int | None) -> None:
        """Parameters that are not trained: the working copies are all there is of them."""
        if stage != 3:
            self._hold_module(state, strip)
            return
        for key, shape in (state.get("frozen_param_shapes") or {}).items():
            fragments = [self._model_state(rank)["frozen_param_fragments"] for rank in range(len(self._model_files))]
            parts = [(file, held[key]) for file, held in zip(self._model_files, fragments, strict=True)]
            self._hold(WEIGHTS, key.removeprefix(strip), shape, parts)

    def _hold_module(self, state: dict[str, Any], strip: str) -> None:
        """The working weights of what has no master."""
        buffers = set(state.get("buffer_names") or ())
        known = self.tensors.get(WEIGHTS, {})
        for key, value in state["module"].items():
            if key not in buffers and key.removeprefix(strip) not in known:
                self._hold(WEIGHTS, key.removeprefix(strip), value.shape, [(self._model_files[0], value)])

    # ZeRO 0: the optimizer's state is in the file of the model.

    def _open_unpartitioned(self, state: dict[str, Any]) -> None:
        self.training = {"zero_stage": 0}
        self._hold_module(state, prefix(list(state["module"]), self.path))
        optimizer, file = state.get("optimizer"), self._model_files[0]
        if not isinstance(optimizer, dict):
            return
        adam = optimizer.get("optimizer_state_dict", optimizer)
        numbers = [group["params"] for group in adam["param_groups"]]
        if not all(number in adam["state"] for group in numbers for number in group):
            adam = adam | {"state": {}}  # no step was taken yet
        # By parameter group: what DeepSpeed's fused optimizer keeps is flat, what its unfused one keeps is not.
        flat, shaped = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
        masters = [[group] for group in flat] if flat is not None else shaped
        if masters is None and not adam["state"]:
            return
        held = masters or [[adam["state"][number][MOMENTS[0]] for number in group] for group in numbers]
        shapes = {name: stored.shape for name, stored in self.tensors[WEIGHTS].items()}
        if flat is not None:
            places = stretches_of(shapes, [group.numel() for group in flat])
        else:
            places = owners_of(shapes, [[tuple(tensor.shape) for tensor in group] for group in held])
        if places is None:
            lost = "Adam's moments are" if masters is None else "fp32 masters and Adam's moments are"
            self.notes.append(
                f"{self.path} does not say which of its {len(numbers)} parameter groups holds which parameter, and "
                f"shapes do not tell: {lost} left out, and the working weights are taken"
            )
            return
        for name, (group, index, start) in places.items():
            of_kinds = {WEIGHTS: masters[group][index]} if masters else {}
            if adam["state"]:
                of_kinds |= {kind: adam["state"][numbers[group][index]][kind] for kind in MOMENTS}
            for kind, tensor in of_kinds.items():
                part = tensor if flat is None else tensor[start : start + prod(shapes[name])]
                self._hold(kind, name, shapes[name], [(file, part)])
        if adam["state"]:
            self.optimizer_steps = self._steps(adam, numbers[0][0], file)

    # What the files hold.

    def _model_state(self, rank: int) -> dict[str, Any]:
        state = self._files.contents(self._model_files[rank])
        if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
            raise ValueError(f"{self._model_files[rank]}: is no model state of DeepSpeed; it has no `module`")
        return state

    def _optimizer_state(self, rank: int) -> dict[str, Any]:
        state = self._files.contents(self._optimizer_files[rank])
        inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
        if not isinstance(inner, dict):
            raise ValueError(f"{self._optimizer_files[rank]}: is no optimizer state of DeepSpeed")
        return inner

    def _adam(self, rank: int) -> dict[str, Any]:
        """The state dict of the optimizer that DeepSpeed's wraps."""
        state = self._optimizer_state(rank)
        adam = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
        if not isinstance(adam, dict):
            raise ValueError(
                f"{self._optimizer_files[rank]}: its optimizer state is an elastic one, which DeepSpeed gave up; save "
                "it again with elastic_checkpoint=false"
            )
        return adam

    def _flats(self, kind: str, rank: int) -> list[Tensor]:
        """The flat tensors of a kind that a rank has, one a group."""
        if kind == WEIGHTS:
            state = self._optimizer_state(rank)
            found = state.get("single_partition_of_fp32_groups", state.get("fp32_flat_groups"))
        else:
            adam = self._adam(rank)
            found = [adam["state"].get(i, {}).get(kind) for group in adam["param_groups"] for i in group["params"]]
        if not found or not all(isinstance(flat, Tensor) and flat.dim() == 1 for flat in found):
            raise ValueError(f"{self._optimizer_files[rank]}: has no {kind} of every group (was it moved to NVMe?)")
        return list(found)

    def _steps(self, adam: dict[str, Any], number: Any, file: Path) -> int:
        """Steps that Adam has taken: of a parameter, or of its group where a fused one counts there."""
        step = adam["state"][number].get("step", adam["param_groups"][0].get("step", 0))
        return int(self._files.read(file, step) if isinstance(step, Tensor) else step)


def _by_rank(path: Path, suffix: str) -> list[Path]:
    files = {}
    for file in path.glob(f"*{suffix}"):
        named = re.fullmatch(rf"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+){re.escape(suffix)}", file.name)
        if named is None:
            raise ValueError(f"{file}: is not of a plain DeepSpeed checkpoint (experts and layer files are not read)")
        if int(named.group(2)):
            raise ValueError(
                f"{path} is of several model-parallel ranks ({file.name}), whose splits DeepSpeed names not"
            )
        files[int(named.group(1) or 0)] = file
    if sorted(files) != list(range(len(files))):
        raise ValueError(f"{path} is not complete: it has {suffix} files of the ranks {sorted(files)} alone")
    return [files[rank] for rank in sorted(files)]
