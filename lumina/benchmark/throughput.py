"""`lumina benchmark throughput`: steps of training on packs of noise, with the real model, engine and optimizer."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from lumina.benchmark import record
from lumina.benchmark.breakdown import DATA, OPTIMIZER, hidden, seconds_by_category
from lumina.benchmark.footprint import Footprint, Watch
from lumina.config.load import with_overrides
from lumina.config.schema import Config
from lumina.encoders.vae import build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.flops import Flops, forward_flops
from lumina.model.tokens import Captions, token_count
from lumina.parallel.engine import Engine
from lumina.parallel.layout import accumulation_steps, check_layout, describe
from lumina.parallel.mesh import Mesh, World, close_mesh, open_mesh
from lumina.parallel.randomness import Randomness
from lumina.train.ema import EMA
from lumina.train.metrics import peak_tflops
from lumina.train.prepare import Encoded, Identity, Preparer, TrainingPack
from lumina.train.step import train_step

_SHORT = {"tp": "tensor", "pp": "pipeline", "zero": "zero_stage"}
_MATRIX = {"cuda": 8192, "cpu": 2048}  # side of the product whose speed stands for a peak that is measured


@dataclass(frozen=True)
class Row:
    """Of one layout. Seconds are of a step, medians; those of a rank that is slower count. Bytes are the most of any.

    model_tflops: per device, forward and backward, of `gemm_share` products with weights and for the rest attention.
    hardware_tflops: with what recomputation adds.
    mfu: None where no peak is known.
    by_category: mean seconds of rank 0 under the profiler, which `profiled_seconds` took in all.
    hidden: of these, what goes on beside something else.
    """

    model: str
    parameters: int
    layout: str
    precision: str
    recompute: str
    world: int
    tokens_per_sample: int
    samples: int
    tokens: int
    seconds: float
    fastest: float
    slowest: float
    tokens_per_second: float
    samples_per_second: float
    model_tflops: float
    gemm_share: float
    hardware_tflops: float
    peak_tflops: float | None
    mfu: float | None
    memory: dict[str, int]
    by_category: dict[str, float]
    hidden: dict[str, float]
    profiled_seconds: float


def benchmark_throughput(arguments: argparse.Namespace) -> None:
    """The verb: measures, prints on rank 0, and writes `--out` there."""
    config, sizes = _config(arguments)
    world = World.from_environment()
    check_layout(config, sizes, world.size)
    if world.rank == 0:
        for path in (arguments.out, arguments.trace):
            record.check_writable(path)
    with _mesh(config) as mesh:
        bench = _Bench(arguments, config, sizes, mesh)
        row = bench.measure()
        if mesh.is_first:
            facts = record.surroundings(mesh.device)
            results = record.Results(arguments.out, facts)
            results.add(row.model, [row])
            print(f"{record.heading(facts)}\n{described(row)}")


def _config(arguments: argparse.Namespace) -> tuple[Config, FlagDiTConfig]:
    """The run that is measured, and its model's sizes.

    Raises:
        ValueError: for what does not fit together.
    """
    for name in ("tokens", "samples", "steps", "warm_up", "profile_steps"):
        if getattr(arguments, name) < (0 if name in ("warm_up", "profile_steps") else 1):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is too few")
    if arguments.peak not in (None, "measured"):
        try:
            arguments.peak = float(arguments.peak)
        except ValueError:
            raise ValueError(f"--peak {arguments.peak} is no number of TFLOP/s, and not `measured`") from None
    conditions = {"cap_feat_dim": 4096} if arguments.text_tokens else {"num_classes": 1000}
    tree: dict[str, Any] = {
        "run": {"dir": "none"},
        "model": {"preset": arguments.model, "in_channels": 4} | conditions,
        "vae": {"model": "none"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1, "ema_decay": 0.9999},
        "precision": arguments.dtype,
    }
    config = with_overrides(tree, [*layout_settings(arguments.layout), *arguments.overrides], "benchmark")
    sizes = FlagDiTConfig.from_dict(config.model)
    if sizes.text_conditional != bool(arguments.text_tokens):
        raise ValueError("--text-tokens 0 measures a label-conditional model: set model.num_classes, or give some")
    world, parallel = World.from_environment().size, config.parallel
    replicas = max(1, world // (parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses))
    packs = arguments.packs or (2 * parallel.pipeline if parallel.pipeline > 1 else 1)
    overrides = [f"train.global_batch_packs={packs * replicas}"]
    return with_overrides(config.model_dump(by_alias=True), overrides, "benchmark"), sizes


def layout_settings(text: str) -> list[str]:
    """``tp=2,ring=4,zero=1,sequence=true`` as settings of the section `parallel`.

    Raises:
        ValueError: for what is not of this form.
    """
    words = [word for word in text.split(",") if word]
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"--layout {text}: {wrong[0]!r} is not of the form axis=size, as tp=2,ring=4,zero=1")
    pairs = [word.split("=", 1) for word in words]
    return [f"parallel.{_SHORT.get(key, key)}={value}" for key, value in pairs]


@contextmanager
def _mesh(config: Config) -> Iterator[Mesh]:
    mesh = open_mesh(config.parallel)
    try:
        yield mesh
    finally:
        close_mesh(mesh)


def latent_shape(tokens: int, sizes: FlagDiTConfig) -> tuple[int, int, int, int]:
    """Of one frame, as near to a square as it goes, of as many tokens as go into `tokens`."""
    patch, extra = sizes.patch_size, int(sizes.text_conditional)
    rows = max(1, int((tokens + extra) ** 0.5))
    choices = ((r, tokens // r - extra) for r in range(max(1, rows * 3 // 4), rows + 1))
    row, column = max(((r, c) for r, c in choices if c > 0), key=lambda rc: rc[0] * (rc[1] + extra), default=(1, 1))
    return 1, sizes.in_channels, row * patch, column * patch


class _Bench:
    def __init__(self, arguments: argparse.Namespace, config: Config, sizes: FlagDiTConfig, mesh: Mesh):
        self.arguments, self.config, self.sizes, self.mesh = arguments, config, sizes, mesh
        self.watch = Watch(mesh.device)
        self.accumulation = accumulation_steps(config, mesh.data.size)
        self.objective = Objective.build(**config.flow.model_dump())
        self.shape = latent_shape(arguments.tokens, sizes)
        vae = build_vae(config.vae, sizes.in_channels, mesh.device)
        self.preparer = Preparer(sizes, vae, None, self.objective, Randomness(0), 0.0, mesh)
        torch.manual_seed(0)
        model = FlagDiT(sizes)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = Engine(model, config, mesh, self.accumulation)
        self.ema = EMA(self.engine.fragments, config.train.ema_decay)
        self.encoded = [self._encoded(pack) for pack in range(self.accumulation)]
        self.samples = arguments.samples * self.accumulation * mesh.data.size
        self.step_number = 0

    def measure(self) -> Row:
        try:
            return self._measure()
        finally:
            self.engine.close()

    def _measure(self) -> Row:
        for _ in range(self.arguments.warm_up):
            self._step()
        seconds = [self._timed() for _ in range(self.arguments.steps)]
        self._step(before_update=lambda: self.watch.gradients_are_there(self.engine))
        footprint = self._most(self.watch.footprint(self.engine, self.ema))
        shared, profiled = self._profiled()
        step = statistics.median(seconds)
        packs = self.config.train.global_batch_packs
        captions = [self.arguments.text_tokens] * self.arguments.samples if self.sizes.text_conditional else []
        flops = forward_flops(self.sizes, [self.tokens_per_sample] * self.arguments.samples, captions)
        world = self.mesh.world.size
        peak = self._peak()
        tflops = 3 * flops.total * packs / step / world / 1e12
        return Row(
            model=self.arguments.model,
            parameters=self.parameters,
            layout=f"{describe(self.mesh)}, ZeRO {self.config.parallel.zero_stage}",
            precision=self.config.precision,
            recompute=self.config.parallel.recompute,
            world=world,
            tokens_per_sample=self.tokens_per_sample,
            samples=self.samples,
            tokens=self.tokens_per_sample * self.samples,
            seconds=step,
            fastest=min(seconds),
            slowest=max(seconds),
            tokens_per_second=self.tokens_per_sample * self.samples / step,
            samples_per_second=self.samples / step,
            model_tflops=tflops,
            gemm_share=flops.gemm / flops.total,
            hardware_tflops=tflops + _recomputed(flops, self.config.parallel.recompute) * packs / step / world / 1e12,
            peak_tflops=peak,
            mfu=tflops / peak if peak else None,
            memory=asdict(footprint),
            by_category={name: value for name, value in shared.items() if not hidden(name)},
            hidden={name: value for name, value in shared.items() if hidden(name)},
            profiled_seconds=profiled,
        )

    @property
    def tokens_per_sample(self) -> int:
        frames, _, height, width = self.shape
        return token_count(frames, height, width, self.sizes.patch_size, self.sizes.text_conditional)

    def _encoded(self, pack: int) -> Encoded:
        """Noise in place of pictures, the same on all ranks that work on the pack."""
        generator, count = torch.Generator().manual_seed(pack), self.arguments.samples
        device, first = self.mesh.device, (self.mesh.data.rank * self.accumulation + pack) * count
        latents = [torch.randn(self.shape, generator=generator).to(device) for _ in range(count)]
        captions = labels = None
        if self.sizes.text_conditional:
            width, length = self.sizes.cap_feat_dim, self.arguments.text_tokens
            features = torch.randn(count * length, width, generator=generator)
            captions = Captions.of(features.to(device), (length,) * count)
        else:
            labels = torch.zeros(count, dtype=torch.long, device=device)
        return Encoded(tuple(Identity(first + n, 0, 0) for n in range(count)), latents, captions, labels)

    def _packs(self) -> Sequence[TrainingPack]:
        with record_function(DATA):
            return [self.preparer.pack(encoded) for encoded in self.encoded]

    def _step(self, before_update=lambda: None) -> None:
        self.step_number += 1
        packs, update = self._packs(), None

        def at_update() -> None:
            nonlocal update
            before_update()
            update = record_function(OPTIMIZER)
            update.__enter__()

        train_step(
            self.engine,
            self.ema,
            self.objective,
            packs,
            global_samples=self.samples,
            learning_rate=1e-5,
            step=self.step_number,
            before_update=at_update,
        )
        update.__exit__(None, None, None)
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()

    def _timed(self) -> float:
        """As long as the slowest rank takes."""
        self.mesh.barrier()
        start = time.perf_counter()
        self._step()
        own = time.perf_counter() - start
        return max(self.mesh.gather(own) or [own])

    def _most(self, mine: Footprint) -> Footprint:
        """Of all ranks the most of each, on rank 0."""
        found = [asdict(one) for one in self.mesh.gather(mine) or [mine]]
        return Footprint(**{name: max(one[name] for one in found) for name in found[0]})

    def _profiled(self) -> tuple[dict[str, float], float]:
        steps = self.arguments.profile_steps
        if not steps:
            return {}, 0.0
        total = 0.0

        def step() -> None:
            nonlocal total
            start = time.perf_counter()
            self._step()
            total += time.perf_counter() - start

        with tempfile.TemporaryDirectory() as folder:
            named = self.arguments.trace if self.mesh.is_first else None
            trace = Path(named) if named else Path(folder) / "trace.json"
            self.mesh.barrier()
            shared = seconds_by_category(step, steps, self.mesh, trace)
        return shared, total / steps

    def _peak(self) -> float | None:
        """TFLOP/s of one device: given, known, or measured."""
        asked = self.arguments.peak
        if asked is None:
            return peak_tflops(self.config, self.mesh.device)
        return measured_peak(self.mesh.device, self.config.precision) if asked == "measured" else asked


def measured_peak(device: torch.device, precision: str) -> float:
    """TFLOP/s of a large square product, the best of a few."""
    dtype, side = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], _MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def _recomputed(flops: Flops, recompute: str) -> int:
    """Of one forward pass, what the backward pass does again; selectively, all of the blocks but attention."""
    return {"none": 0, "selective": flops.in_blocks, "full": flops.in_blocks + flops.attention}[recompute]


def described(row: Row) -> str:
    """Tables: speed, memory, time."""
    peak = "" if row.mfu is None else f" ({row.mfu:.1%} of {row.peak_tflops:,.2f})"
    speed = [
        ("layout", row.layout),
        ("model", f"{row.model}, {row.parameters:,} parameters, {row.precision}, recompute {row.recompute}"),
        ("step", f"{row.samples} samples of {row.tokens_per_sample:,} tokens"),
        ("seconds", f"{row.seconds:.4g} ({row.fastest:.4g} – {row.slowest:.4g})"),
        ("tokens/s", f"{row.tokens_per_second:,.0f}; {row.samples_per_second:,.4g} samples/s"),
        ("model TFLOP/s a device", f"{row.model_tflops:,.4g}{peak}; {row.gemm_share:.1%} in products with weights"),
        ("hardware TFLOP/s a device", f"{row.hardware_tflops:,.4g}"),
    ]
    memory = [(name, f"{size / 2**20:,.1f}") for name, size in row.memory.items()]
    tables = [record.table(["", ""], speed), record.table(["memory of a rank", "MiB"], memory)]
    if row.by_category:
        whole = sum(row.by_category.values())
        ordered = sorted(row.by_category.items(), key=lambda item: -item[1])
        times = [(name, f"{value * 1e3:,.2f}", f"{value / whole:.1%}") for name, value in ordered]
        times += [(name, f"{value * 1e3:,.2f}", "") for name, value in row.hidden.items()]
        tables.append(record.table(["time of a step on rank 0, profiled", "ms", ""], times))
    return "\n\n".join(tables)
