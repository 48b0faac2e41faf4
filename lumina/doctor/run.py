"""Whether the run that a configuration describes can start here: layout, memory, shards, checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from lumina.checkpoint.load import Checkpoint, latest_checkpoint, model_config
from lumina.checkpoint.manifest import EMA, WEIGHTS
from lumina.checkpoint.sources import open_source, source_of
from lumina.config.load import load_config
from lumina.config.schema import Config
from lumina.data.find import MissingShard, look_for_shards
from lumina.data.index import Access, DataSet, Index
from lumina.data.shard_index import ShardHeader, index_path, open_headers, parse_header
from lumina.data.sources import LocalSource, Source
from lumina.doctor.check import FAIL, OK, WARNING, Check, listed
from lumina.encoders.vae import build_vae
from lumina.model.config import FlagDiTConfig
from lumina.model.lora import adapted_layers
from lumina.model.pretrained import check_fit
from lumina.parallel.layout import check_layout
from lumina.planner.memory import MemoryPlan, largest, meta_model, plan_memory, trained_elements
from lumina.train.assemble import check_conditions, plan_of, sets_of, sizing_of
from lumina.train.initial import check_variants, drawn_and_left
from lumina.train.resume import check_same_run

_GIB, _MIB = 2**30, 2**20
_FULL_SHARE = 0.9
_LIGHT_VAES = ("identity", "none")  # which take no time to make


@dataclass
class Run:
    """A configuration that has been looked at."""

    config: Config | None = None
    sizes: FlagDiTConfig | None = None
    parameters: int = 0
    fits: bool = False
    """Whether its layout can be laid over the ranks."""
    checks: list[Check] = field(default_factory=list)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, average and two moments, fp32; of a run with `lora` those of its adapters."""
        return 4 * 4 * (trained_elements(self.config, self.sizes) if self.config.lora else self.parameters)


def open_run(path: str, overrides: Sequence[str]) -> Run:
    """The configuration, and whether it can be read at all."""
    run = Run()
    try:
        run.config = load_config(path, overrides)
        run.sizes = model_config(run.config)
        if run.config.lora is not None:
            adapted_layers(meta_model(run.sizes), run.config.lora.target_modules)
    except ValueError as error:
        run.config = None
        run.checks.append(Check("configuration", FAIL, str(error), f"correct {path}, or the key=value after it"))
        return run
    run.parameters = sum(parameter.numel() for parameter in meta_model(run.sizes).parameters())
    said = f"{path}: Flag-DiT of {run.parameters:,} parameters, {run.config.precision}"
    run.checks.append(Check("configuration", OK, said))
    return run


def check_run(run: Run, world: int | None, slots: Sequence[int] | None) -> Iterator[Check]:
    """What follows from a configuration that can be read.

    Args:
        world: ranks in all; None where nothing tells: the fewest that the layout takes.
        slots: devices of this host that are used; None: all.
    """
    yield from _layout(run, world)
    if run.fits:
        ranks = world or _fewest(run.config)
        here = len(slots) if slots is not None else min(ranks, max(1, torch.cuda.device_count()))
        yield from _memory(run, ranks, here, slots)
    yield from check_shards(run.config, run.sizes)
    yield check_checkpoint(run.config, run.sizes)


def _fewest(config: Config) -> int:
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses


def _layout(run: Run, world: int | None) -> Iterator[Check]:
    fewest = _fewest(run.config)
    try:
        check_layout(run.config, run.sizes, world or fewest)
    except ValueError as error:
        yield Check("layout", FAIL, str(error), "set what the sentence names, or take another number of ranks")
        return
    run.fits = True
    if world is None:
        more = "" if fewest == 1 else "; --ranks N or --hostfile tells whether it fits on yours"
        yield Check("layout", OK, f"takes ranks in multiples of {fewest}{more}")
    else:
        yield Check("layout", OK, f"fits {world} rank{'s' * (world > 1)}, {world // fewest} of them data-parallel")


def _memory(run: Run, world: int, here: int, slots: Sequence[int] | None) -> Iterator[Check]:
    plan = largest(plan_memory(run.config, run.sizes, world, on_cpu=not torch.cuda.is_available()))
    said = (
        f"{_size(plan.weights)} weights, {_size(plan.gradients)} gradients, {_size(plan.masters)} masters, "
        f"{_size(plan.moments)} moments, {_size(plan.ema)} EMA, at most {_size(plan.buffers)} buffers, about "
        f"{_size(plan.activations)} activations"
    )
    host, total = psutil.virtual_memory(), 0
    if torch.cuda.is_available():
        devices = slots if slots is not None else range(torch.cuda.device_count())
        devices = [number for number in devices if number < torch.cuda.device_count()] or [0]
        free, total = min(torch.cuda.mem_get_info(number) for number in devices)
        side = f"a rank takes {_size(plan.on_device)} of a GPU's {_size(total)}, of which {_size(free)} are free"
        yield _fit("memory", f"{side} ({said}; encoders apart)", plan, plan.on_device, free, total)
        on_host = here * max(plan.on_host, plan.loading)
        side = f"{here} rank{'s' * (here > 1)} take{'s' * (here == 1)} {_size(on_host)}, the model while it is loaded"
    else:
        on_host = here * max(plan.on_device + plan.on_host, plan.loading)
        side = f"{here} rank{'s' * (here > 1)} take{'s' * (here == 1)} {_size(on_host)} ({said} each; encoders apart)"
    side += f", of {_size(host.total)} that the host has, {_size(host.available)} of them free"
    yield _fit("host memory", side, plan, on_host, host.available, host.total)


def _fit(name: str, said: str, plan: MemoryPlan, needed: int, free: int, total: int) -> Check:
    certain = needed - (plan.activations + plan.buffers if name == "memory" else 0)
    if certain > total:
        return Check(name, FAIL, said, _smaller(name))
    if needed > _FULL_SHARE * free:
        return Check(name, WARNING, said, f"end what else runs there; or {_smaller(name)}")
    return Check(name, OK, said)


def _smaller(name: str) -> str:
    if name == "memory":
        return (
            "raise parallel.zero_stage, parallel.tensor or parallel.pipeline, take more ranks, set "
            "parallel.offload_optimizer=true, parallel.recompute=full, or lower train.tokens_per_pack"
        )
    return "take fewer ranks on a host, or hosts with more memory"


def check_shards(config: Config, sizes: FlagDiTConfig) -> Iterator[Check]:
    """Whether every shard is there and as its index says, and what is in them is what the model is trained on."""
    sets, access = sets_of(config.data)
    try:
        headers, problems, waiting = _headers(sets, access)
    except (ValueError, OSError) as error:
        yield Check("shards", FAIL, str(error), "correct data.shards, or mount the folder that it names on this host")
        return
    if problems:
        mend = "copy them from their source; `lumina data check` reads shards from end to end"
        yield Check("shards", FAIL, listed(problems), mend)
        return
    count = sum(map(len, headers)) + len(waiting)
    if waiting:
        mend = "`lumina data index` builds them now; training would do it before its first step"
        yield Check("shards", WARNING, f"{count} there; without an index that matches: {listed(waiting)}", mend)
        return
    try:
        index = Index(headers, [one.weight for one in sets], access)
        check_conditions(index, sizes)
        if config.vae.model in _LIGHT_VAES:
            vae = build_vae(config.vae, sizes.in_channels)
            plan_of(config, sizes, vae, index, sizing_of(config, sizes, vae))
    except ValueError as error:
        yield Check("shards", FAIL, str(error), "correct the data or the setting that the sentence names")
        return
    yield Check("shards", OK, f"{count} there, as their indexes say: {len(index):,} samples")


def _headers(sets: Sequence[DataSet], access: Access) -> tuple[list[list[ShardHeader]], list[str], list[str]]:
    """Of each set; what is wrong with shards; and shards without an index that matches."""
    headers, problems, waiting = [], [], []
    for one in sets:
        sources, missing = look_for_shards(one.shards, pipe_programs=access.pipe_programs)
        problems += [_missing(shard) for shard in missing]
        readable = []
        for source in sources:
            if wrong := _wrong(source):
                problems.append(wrong)
            else:
                readable.append(source)
        headers.append([])
        for source, header in zip(readable, open_headers(readable, access.index_dir), strict=True):
            if header is None:
                waiting.append(str(source))
            else:
                headers[-1].append(header)
    return headers, problems, waiting


def _missing(shard: MissingShard) -> str:
    return f"shard {shard.folder}/{shard.name} is missing{shard.why}"


def _wrong(source: Source) -> str:
    """Of a local shard: why it cannot be read, or is another than its index beside it describes."""
    if not isinstance(source, LocalSource):
        return ""
    try:
        size = source.size()
        source.read(0, min(size, 512))
    except (ValueError, OSError) as error:
        return f"shard {source} cannot be read: {error}"
    finally:
        source.close()
    path = index_path(source.path)
    header = parse_header(source, LocalSource(path)) if path.is_file() else None
    if header is not None and header.shard_size != size and path.stat().st_mtime_ns >= source.path.stat().st_mtime_ns:
        return f"shard {source} has {size:,} bytes, and its index says {header.shard_size:,}"
    return ""


def check_checkpoint(config: Config, sizes: FlagDiTConfig) -> Check:
    """Whether the run can go on from its newest checkpoint, or start from `train.init_from`."""
    run_dir = Path(config.run.dir)
    try:
        checkpoint = latest_checkpoint(run_dir)
        if checkpoint is None:
            return _initial(config, sizes)
        check_same_run(config, checkpoint)
        shapes = {name: stored.shape for name, stored in source_of(checkpoint).tensors[WEIGHTS].items()}
        expected = {name: tuple(p.shape) for name, p in meta_model(sizes).named_parameters()}
        check_fit(expected, shapes, str(checkpoint.directory))
        wrong = _incomplete(checkpoint)
    except (ValueError, OSError) as error:
        mend = "set it back, or name another run.dir; a damaged checkpoint is moved away, and the one before taken"
        return Check("checkpoint", FAIL, str(error), mend)
    said = f"{checkpoint.directory}, step {checkpoint.manifest.step} of {config.train.steps}"
    if wrong:
        mend = "training checks it and takes the one before it; copy it again if it was copied"
        return Check("checkpoint", WARNING, f"{said}: {wrong}", mend)
    return Check("checkpoint", OK, f"{said}: {len(shapes)} tensors of the model's shapes; the run goes on from it")


def _initial(config: Config, sizes: FlagDiTConfig) -> Check:
    start = config.train.init_from
    if start is None:
        return Check("checkpoint", OK, f"none in {config.run.dir}: the run starts from the beginning")
    try:
        source = open_source(Path(start), sizes)
        check_variants(source.model, sizes, start)
        kinds = [{"model": WEIGHTS, "ema": EMA}[config.train.init_weights], WEIGHTS, EMA]
        kind = next((kind for kind in kinds if kind in source.tensors), None)
        if kind is None:
            raise ValueError(f"train.init_from={start} has no weights")
        shapes = {name: stored.shape for name, stored in source.tensors[kind].items()}
        drawn, left = drawn_and_left(
            meta_model(sizes), shapes, config.train.allow_missing, start, new_text_branch=config.train.new_text_branch
        )
    except (ValueError, OSError) as error:
        return Check(
            "checkpoint", FAIL, str(error), "correct what the sentence names: train.init_from, the model's sizes, …"
        )
    more = f"; drawn anew: {len(drawn)}, left out: {len(left)}" if drawn or left else ""
    return Check("checkpoint", OK, f"none in {config.run.dir}: the run starts from {start}{more}")


def _incomplete(checkpoint: Checkpoint) -> str:
    """Files that are not there, or not of their size; hashes are looked at when it is loaded."""
    wrong = []
    for name, entry in checkpoint.manifest.files.items():
        path = checkpoint.directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            wrong.append(f"{name} {'is missing' if size is None else f'has {size:,} bytes, not {entry.bytes:,}'}")
    return listed(wrong)


def _size(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.1f} MiB"
