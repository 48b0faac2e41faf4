"""`lumina benchmark throughput`: steps of training on packs of noise, with the real model, engine and optimizer."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import record_function

from lumina.benchmark import record
from lumina.benchmark.breakdown import DATA, OPTIMIZER, hidden, seconds_by_category
from lumina.benchmark.footprint import Footprint, Watch
from lumina.benchmark.noise import settings
from lumina.config.load import with_overrides
from lumina.config.schema import Config
from lumina.encoders.vae import build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.flops import forward_flops
from lumina.model.tokens import Captions, token_count
from lumina.parallel.engine import Engine
from lumina.parallel.layout import accumulation_steps, check_layout, described
from lumina.parallel.mesh import Mesh
from lumina.parallel.randomness import Randomness
from lumina.train.ema import EMA
from lumina.train.metrics import peak_tflops
from lumina.train.prepare import Encoded, Identity, Preparer, TrainingPack
from lumina.train.step import train_step

_SHORT = {"tp": "tensor", "pp": "pipeline", "zero": "zero_stage"}
_MATRIX = {"cuda": 8192, "cpu": 2048}  # side of the product whose speed stands for a peak that is measured


@dataclass(frozen=True)
class Point:
    """What is measured: a model, under a layout, on packs of samples of so many tokens; options of the verb.

    packs: of a replica in a step; None: 1, or 2 for each pipeline stage.
    layout: as `layout_settings` takes it.
    peak: TFLOP/s of a device; "measured"; None: what is known of it.
    overrides: ``section.key=value``.
    trace: where the trace is written.
    """

    model: str
    tokens: int
    layout: str
    samples: int
    packs: int | None
    text_tokens: int
    dtype: str
    steps: int
    warm_up: int
    profile_steps: int
    peak: str | float | None
    overrides: tuple[str, ...]
    trace: str | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.layout or 'data parallel'}, {self.tokens:,} tokens"


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
    text_tokens: int
    samples: int
    samples_per_pack: int
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


def configured(point: Point, world_size: int) -> tuple[Config, FlagDiTConfig]:
    """The run that is measured, and its model's sizes.

    Raises:
        ValueError: for what does not fit together, or to the ranks.
    """
    least = {"tokens": 1, "samples": 1, "steps": 1, "packs": 1, "warm_up": 0, "profile_steps": 0, "text_tokens": 0}
    for name, minimum in least.items():
        if (value := getattr(point, name)) is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too few")
    conditions = {"cap_feat_dim": 4096} if point.text_tokens else {"num_classes": 1000}
    tree = settings(point.model, conditions, point.dtype)
    config = with_overrides(tree, [*layout_settings(point.layout), *point.overrides], "benchmark")
    if config.lora is not None:
        raise ValueError("what is measured is the training of all weights: leave lora out")
    sizes = FlagDiTConfig.from_dict(config.model)
    if sizes.text_conditional != bool(point.text_tokens):
        raise ValueError("--text-tokens 0 measures a label-conditional model: set model.num_classes, or give some")
    parallel = config.parallel
    replicas = max(1, world_size // (parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses))
    packs = point.packs or (2 * parallel.pipeline if parallel.pipeline > 1 else 1)
    overrides = [f"train.global_batch_packs={packs * replicas}"]
    config = with_overrides(config.model_dump(by_alias=True), overrides, "benchmark")
    check_layout(config, sizes, world_size)
    return config, sizes


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


def latent_shape(tokens: int, sizes: FlagDiTConfig) -> tuple[int, int, int, int]:
    """Of one frame, as near to a square as it goes, of as many tokens as go into `tokens`."""
    patch, extra = sizes.patch_size, int(sizes.text_conditional)
    rows = max(1, int((tokens + extra) ** 0.5))
    choices = ((r, tokens // r - extra) for r in range(max(1, rows * 3 // 4), rows + 1))
    row, column = max(((r, c) for r, c in choices if c > 0), key=lambda rc: rc[0] * (rc[1] + extra), default=(1, 1))
    return 1, sizes.in_channels, row * patch, column * patch


def tokens_of(tokens: int, sizes: FlagDiTConfig) -> int:
    """Of a sample of `latent_shape`."""
    frames, _, height, width = latent_shape(tokens, sizes)
    return token_count(frames, height, width, sizes.patch_size, sizes.text_conditional)


class Bench:
    """A point, ready to be measured on this rank."""

    def __init__(self, point: Point, config: Config, sizes: FlagDiTConfig, mesh: Mesh):
        self.point, self.config, self.sizes, self.mesh = point, config, sizes, mesh
        self.watch = Watch(mesh.device)
        self.accumulation = accumulation_steps(config, mesh.data.size)
        self.objective = Objective.build(**config.flow.model_dump())
        self.shape = latent_shape(point.tokens, sizes)
        vae = build_vae(config.vae, sizes.in_channels, mesh.device)
        self.preparer = Preparer(sizes, vae, None, self.objective, Randomness(0), 0.0, mesh)
        torch.manual_seed(0)
        model = FlagDiT(sizes)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = Engine(model, config, mesh, self.accumulation)
        self.ema = EMA(self.engine.fragments, config.train.ema_decay)
        self.encoded = [self._encoded(pack) for pack in range(self.accumulation)]
        self.samples = point.samples * self.accumulation * mesh.data.size
        self.step_number = 0

    def measure(self) -> Row:
        """On all ranks; what the first returns counts."""
        for _ in range(self.point.warm_up):
            self._step()
        seconds = [self._timed() for _ in range(self.point.steps)]
        self._step(before_update=lambda: self.watch.gradients_are_there(self.engine))
        footprint = self._most(self.watch.footprint(self.engine, self.ema))
        shared, profiled = self._profiled()
        step = statistics.median(seconds)
        packs = self.config.train.global_batch_packs
        captions = [self.point.text_tokens] * self.point.samples if self.sizes.text_conditional else []
        flops = forward_flops(self.sizes, [self.tokens_per_sample] * self.point.samples, captions)
        world = self.mesh.world.size
        peak = self._peak()
        tflops = 3 * flops.total * packs / step / world / 1e12
        return Row(
            model=self.point.model,
            parameters=self.parameters,
            layout=described(self.config.parallel, world),
            precision=self.config.precision,
            recompute=self.config.parallel.recompute,
            world=world,
            tokens_per_sample=self.tokens_per_sample,
            text_tokens=self.point.text_tokens,
            samples=self.samples,
            samples_per_pack=self.point.samples,
            tokens=self.tokens_per_sample * self.samples,
            seconds=step,
            fastest=min(seconds),
            slowest=max(seconds),
            tokens_per_second=self.tokens_per_sample * self.samples / step,
            samples_per_second=self.samples / step,
            model_tflops=tflops,
            gemm_share=flops.gemm / flops.total,
            hardware_tflops=tflops + flops.again(self.config.parallel.recompute) * packs / step / world / 1e12,
            peak_tflops=peak,
            mfu=tflops / peak if peak else None,
            memory=asdict(footprint),
            by_category={name: value for name, value in shared.items() if not hidden(name)},
            hidden={name: value for name, value in shared.items() if hidden(name)},
            profiled_seconds=profiled,
        )

    @property
    def tokens_per_sample(self) -> int:
        return tokens_of(self.point.tokens, self.sizes)

    def _encoded(self, pack: int) -> Encoded:
        """Noise in place of pictures, the same on all ranks that work on the pack."""
        generator, count = torch.Generator().manual_seed(pack), self.point.samples
        device, first = self.mesh.device, (self.mesh.data.rank * self.accumulation + pack) * count
        latents = [torch.randn(self.shape, generator=generator).to(device) for _ in range(count)]
        captions = labels = None
        if self.sizes.text_conditional:
            width, length = self.sizes.cap_feat_dim, self.point.text_tokens
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
        steps = self.point.profile_steps
        if not steps:
            return {}, 0.0
        total = 0.0

        def step() -> None:
            nonlocal total
            start = time.perf_counter()
            self._step()
            total += time.perf_counter() - start

        with tempfile.TemporaryDirectory() as folder:
            named = self.point.trace if self.mesh.is_first else None
            trace = Path(named) if named else Path(folder) / "trace.json"
            self.mesh.barrier()
            shared = seconds_by_category(step, steps, self.mesh, trace)
        return shared, total / steps

    def _peak(self) -> float | None:
        """TFLOP/s of one device: given, known, or measured."""
        asked = self.point.peak
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


def tables_of(row: Row) -> str:
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
