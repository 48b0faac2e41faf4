"""DeepSpeed's own checkpoint folders, put together by parameter without DeepSpeed.

`engine.save_checkpoint` writes `latest` (the name of a tag) and, in the tag's folder, `*_model_states.pt` (the working
weights, or under ZeRO 3 their names and shapes) and under ZeRO a `*_optim_states.pt` a data-parallel rank: fp32
masters and Adam's moments, flattened over parameters and cut between ranks.
"""

import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina.checkpoint.deepspeed_layout import FROZEN, Piece, cut_groups, cut_parameters, owners_of, prefix, step_of
from lumina.checkpoint.manifest import MOMENTS, WEIGHTS
from lumina.checkpoint.sources import Source
from lumina.checkpoint.tensor_reader import MappedPickles, Stored, stored_of
from lumina.model.config import FlagDiTConfig
from lumina.model.inert import StandIn
from lumina.model.public import sizes_of

LATEST = "latest"


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
        self._pickles = MappedPickles()
        self._model_files = _by_rank(path, "_model_states.pt")
        self._optimizer_files = _by_rank(path, "_optim_states.pt")
        state = self._model_state(0)
        self.step = int(state.get("global_steps", 0))
        self.software = {"deepspeed": str(state.get("ds_version", "unknown"))}
        self._pieces: dict[str, dict[str, list[Piece]]] = {}
        self._whole: dict[str, dict[str, Any]] = {}  # of ZeRO 0, and what is frozen: the way to a tensor in a file
        if state.get("param_shapes") is None:
            self._open_unpartitioned(state)
        else:
            self._open_partitioned(state)
        shapes = {name: stored.shape for name, stored in self.tensors[WEIGHTS].items()}
        self.model = sizes_of(shapes, {}, path) if config is None else config

    def files(self) -> list[Path]:
        return [*self._model_files, *self._optimizer_files]

    def read(self, kind: str, name: str) -> Tensor:
        stored = self.tensors[kind][name]
        if name in self._whole.get(kind, {}):
            values = self._whole[kind][name]()
            self._pickles.touched(values.nbytes)
            return values.view(stored.shape)
        flat = torch.empty(prod(stored.shape), dtype=stored.dtype)
        at = 0
        for rank, group, start, numel in self._pieces[kind][name]:
            flat[at : at + numel] = self._flats(kind, rank)[group].view(-1)[start : start + numel]
            at += numel
        self._pickles.touched(flat.nbytes)
        return flat.view(stored.shape)

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
        self.training = {"zero_stage": stage or 1, "data_parallel": world}
        kinds = [WEIGHTS, *(MOMENTS if self._adam_state(0) else ())]
        if len(kinds) > 1:
            self.optimizer_steps = self._steps()
        self.tensors = {kind: {} for kind in kinds}
        for kind in kinds:
            sizes = [[flat.numel() for flat in self._flats(kind, rank)] for rank in range(world)]
            try:
                plan = cut_parameters(groups, sizes) if stage == 3 else cut_groups(groups, sizes, paddings)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from error
            self._pieces[kind] = {}
            for name, shape, pieces in plan:
                dtype = stored_of(self._flats(kind, 0)[0], f"{self.path}: {kind}").dtype
                self.tensors[kind][name.removeprefix(strip)] = Stored(dtype, shape)
                self._pieces[kind][name.removeprefix(strip)] = pieces
        self._add_frozen(state, strip)

    def _add_frozen(self, state: dict[str, Any], strip: str) -> None:
        """Parameters that are not trained: the working copies are all there is of them."""
        shapes = state.get("frozen_param_shapes") or {}
        known = self.tensors[WEIGHTS]
        if self.training["zero_stage"] != 3:
            buffers = set(state.get("buffer_names") or ())
            for key, value in state["module"].items():
                name = key.removeprefix(strip)
                if name not in known and key not in buffers:
                    known[name] = stored_of(value, f"{self._model_files[0]}: {key}")
                    self._whole.setdefault(WEIGHTS, {})[name] = self._in_module(key)
            return
        for key, shape in shapes.items():
            fragment = state["frozen_param_fragments"][key]
            dtype = stored_of(fragment, f"{self._model_files[0]}: {key}").dtype
            known[key.removeprefix(strip)] = Stored(dtype, tuple(shape))
            self._whole.setdefault(WEIGHTS, {})[key.removeprefix(strip)] = self._in_fragments(key, prod(shape))

    def _in_module(self, key: str) -> Any:
        return lambda: self._model_state(0)["module"][key].detach().clone(memory_format=torch.contiguous_format)

    def _in_fragments(self, key: str, numel: int) -> Any:
        ranks = range(len(self._model_files))
        return lambda: torch.cat([self._model_state(r)["frozen_param_fragments"][key].view(-1) for r in ranks])[:numel]

    # ZeRO 0.

    def _open_unpartitioned(self, state: dict[str, Any]) -> None:
        buffers = set(state.get("buffer_names") or ())
        names = [key for key in state["module"] if key not in buffers]
        strip = prefix(names, self.path)
        self.training = {"zero_stage": 0}
        known = {key.removeprefix(strip): stored_of(state["module"][key], f"{self.path}: {key}") for key in names}
        self.tensors = {WEIGHTS: known}
        self._whole = {WEIGHTS: {key.removeprefix(strip): self._in_module(key) for key in names}}
        optimizer = state.get("optimizer")
        if not isinstance(optimizer, dict):
            return
        if "fp32_groups_flat" in optimizer:
            self._masters_of_flat_groups(optimizer, list(known))
            return
        adam = optimizer.get("optimizer_state_dict", optimizer)
        ids = [group["params"] for group in adam["param_groups"]]
        masters = optimizer.get("fp32_groups")
        moments = bool(adam["state"]) and all(i in adam["state"] for group in ids for i in group)
        if masters is None and not moments:
            return
        shapes = [
            [
                tuple((masters[g][i] if masters is not None else adam["state"][number]["exp_avg"]).shape)
                for i, number in enumerate(group)
            ]
            for g, group in enumerate(ids)
        ]
        owners = owners_of({name: stored.shape for name, stored in known.items()}, shapes)
        if owners is None:
            lost = "fp32 masters and moments" if masters is not None else "Adam's moments"
            self.notes.append(
                f"{self.path} does not say which of its {len(ids)} parameter groups holds which parameter, and shapes "
                f"do not tell: {lost} are left out, and the working weights are taken"
            )
            return
        if masters is not None:
            for name, (group, index) in owners.items():
                known[name] = stored_of(masters[group][index], f"{self.path}: {name}")
                self._whole[WEIGHTS][name] = self._in_optimizer("fp32_groups", group, index)
        if moments:
            self.optimizer_steps = step_of(adam, ids[0][0])
            nested = ("optimizer_state_dict",) if "optimizer_state_dict" in optimizer else ()
            for kind in MOMENTS:
                at = {name: (*nested, "state", ids[group][index], kind) for name, (group, index) in owners.items()}
                self.tensors[kind] = {name: known[name]._replace(dtype=torch.float32) for name in owners}
                self._whole[kind] = {name: self._in_optimizer(*way) for name, way in at.items()}

    def _masters_of_flat_groups(self, optimizer: dict[str, Any], names: list[str]) -> None:
        """What DeepSpeed's fused optimizers keep: one flat tensor a group, whose parameters no file names."""
        flats, adam = optimizer["fp32_groups_flat"], optimizer["optimizer_state_dict"]
        known = self.tensors[WEIGHTS]
        trained = [name for name in names if name != FROZEN]
        for candidate in (names, trained):
            total = sum(prod(known[name].shape) for name in candidate)
            if len(flats) == 1 and flats[0].numel() == total:
                break
        else:
            self.notes.append(
                f"{self.path} does not say which parameters its {len(flats)} flat groups hold: fp32 masters and "
                "moments are left out, and the working weights are taken"
            )
            return
        number = adam["param_groups"][0]["params"][0]
        ways = {WEIGHTS: ("fp32_groups_flat", 0)}
        if number in adam["state"]:
            self.optimizer_steps = step_of(adam, number)
            ways |= {kind: ("optimizer_state_dict", "state", number, kind) for kind in MOMENTS}
        for kind, way in ways.items():
            start, held, whole = 0, self.tensors.setdefault(kind, {}), self._whole.setdefault(kind, {})
            for name in candidate:
                held[name] = known[name]._replace(dtype=torch.float32)
                numel = prod(known[name].shape)
                whole[name] = self._in_optimizer(*way, stretch=slice(start, start + numel))
                start += numel

    def _in_optimizer(self, *way: Any, stretch: slice | None = None) -> Any:
        def read() -> Tensor:
            found = self._model_state(0)["optimizer"]
            for key in way:
                found = found[key]
            found = found.detach() if stretch is None else found.detach().view(-1)[stretch]
            return found.clone(memory_format=torch.contiguous_format)

        return read

    # What the files hold.

    def _model_state(self, rank: int) -> dict[str, Any]:
        state = self._pickles.contents(self._model_files[rank])
        if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
            raise ValueError(f"{self._model_files[rank]}: is no model state of DeepSpeed; it has no `module`")
        return state

    def _optimizer_state(self, rank: int) -> dict[str, Any]:
        state = self._pickles.contents(self._optimizer_files[rank])
        inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
        if not isinstance(inner, dict):
            raise ValueError(f"{self._optimizer_files[rank]}: is no optimizer state of DeepSpeed")
        return inner

    def _adam_state(self, rank: int) -> dict[Any, Any]:
        state = self._optimizer_state(rank)
        adam = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
        if not isinstance(adam, dict):
            raise ValueError(
                f"{self._optimizer_files[rank]}: its optimizer state is an elastic one, which DeepSpeed gave up; save "
                "it again with elastic_checkpoint=false"
            )
        return adam["state"]

    def _flats(self, kind: str, rank: int) -> list[Tensor]:
        """The flat tensors of a kind that a rank has, one a group."""
        state = self._optimizer_state(rank)
        if kind == WEIGHTS:
            found = state.get("single_partition_of_fp32_groups", state.get("fp32_flat_groups"))
        else:
            adam = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
            held = adam["state"]
            found = [held.get(i, {}).get(kind) for group in adam["param_groups"] for i in group["params"]]
        if not found or not all(isinstance(flat, Tensor) for flat in found):
            raise ValueError(f"{self._optimizer_files[rank]}: has no {kind} of every group (was it moved to NVMe?)")
        return [flat.detach() for flat in found]

    def _steps(self) -> int:
        state = self._optimizer_state(0)
        adam = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
        return step_of(adam, next(iter(adam["state"])))


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
