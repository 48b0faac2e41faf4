"""`lumina benchmark baseline`: our training step beside a plain PyTorch one of the same model, on the same samples."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.benchmark import record
from lumina.benchmark.mixes import caption_lengths, patches_of
from lumina.benchmark.noise import mesh_of, settings
from lumina.benchmark.plain_flag_dit import PlainFlagDiT
from lumina.benchmark.plain_training import PaddedBatch, PlainTraining
from lumina.config.load import with_overrides
from lumina.config.schema import Config, ParallelConfig
from lumina.encoders.vae import build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import Captions, token_count, unpack
from lumina.parallel.engine import Engine
from lumina.parallel.mesh import Mesh, World
from lumina.parallel.randomness import Randomness
from lumina.train.ema import EMA
from lumina.train.prepare import Encoded, Identity, Preparer, TrainingPack
from lumina.train.step import train_step

_STIRRED = 0.02
"""Deviation of the parameters that start at zero: with them at zero, the velocity is zero whatever the rest does."""
_TOLERANCE = {"fp32": (1e-5, 3e-3), "bf16": (1e-2, 5e-2)}
"""Relative, of the first step's loss and gradient norm, which ZeRO 0 sums in fp32."""
_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Row:
    """One mix in one precision.

    Seconds are of a step, one for each repetition, in which ours came first and the plain one after it. Losses and
    gradient norms are of the first step, which starts from the same weights, noise and times.

    tokens, caption_tokens: of all samples, which is what ours works on.
    padded_tokens, padded_caption_tokens: what the plain one works on.
    ours_cores, plain_cores: seconds that the process kept cores busy, which other work on the machine hardly changes.
    ratio, ratio_of_cores: medians of plain over ours, repetition by repetition.
    """

    model: str
    parameters: int
    precision: str
    mix: str
    samples: int
    sizes: list[tuple[int, int]]
    tokens: int
    padded_tokens: int
    caption_tokens: int
    padded_caption_tokens: int
    ours: list[float]
    plain: list[float]
    ours_cores: list[float]
    plain_cores: list[float]
    ratio: float
    ratio_of_cores: float
    losses: tuple[float, float]
    gradient_norms: tuple[float, float]

    @property
    def padding(self) -> float:
        """Share of the padded batch that is padding."""
        return 1 - self.tokens / self.padded_tokens


def benchmark_baseline(arguments: argparse.Namespace) -> None:
    """The verb: measures, prints, and writes `--out`.

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the two steps do not compute the same loss and gradient.
    """
    config, sizes = _config(arguments)
    record.check_writable(arguments.out)
    with mesh_of(config.parallel) as mesh:
        facts = record.surroundings(mesh.device)
        results = record.Results(arguments.out, facts)
        row = _measured(arguments, config, sizes, mesh)
        results.add(row.mix, [row])
        print(f"{record.heading(facts)}\n{described(row)}")


def _config(arguments: argparse.Namespace) -> tuple[Config, FlagDiTConfig]:
    for name in ("samples", "text_tokens", "steps", "repeats"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is too few")
    patches_of(arguments.mix, arguments.samples, arguments.resolution)
    tree = settings(arguments.model, {"cap_feat_dim": 4096}, arguments.dtype)
    config = with_overrides(tree, arguments.overrides, "benchmark")
    parallel, flow = config.parallel, config.flow
    if World.from_environment().size > 1 or parallel != ParallelConfig(zero_stage=parallel.zero_stage):
        raise ValueError(
            "the baseline is of one process that keeps what it computes: start one, and of the section parallel set "
            "zero_stage alone"
        )
    if (flow.path, flow.prediction) != ("linear", "velocity"):
        raise ValueError(
            f"flow.path={flow.path} with flow.prediction={flow.prediction}: the plain step learns the velocity of the "
            "linear path"
        )
    return config, FlagDiTConfig.from_dict(config.model)


def _measured(arguments: argparse.Namespace, config: Config, sizes: FlagDiTConfig, mesh: Mesh) -> Row:
    torch.manual_seed(0)
    model = stirred(FlagDiT(sizes).to(mesh.device))
    plain_model = PlainFlagDiT(sizes).to(mesh.device)
    plain_model.load_state_dict(model.state_dict())
    plain = PlainTraining(plain_model, config.train, config.precision, _LEARNING_RATE)
    ours = _Ours(arguments, config, sizes, mesh, model)
    try:
        batch = ours.padded()
        losses, norms = _compared(ours, plain, batch, config.precision)
        seconds = [
            (
                _seconds(ours.step, arguments.steps, mesh.device),
                _seconds(lambda: plain.step(batch, *plain.drawn(batch)), arguments.steps, mesh.device),
            )
            for _ in range(arguments.repeats + 1)
        ][1:]  # the first pair warms caches, and is not counted
    finally:
        ours.engine.close()
    own, theirs = ([pair[which] for pair in seconds] for which in (0, 1))
    return Row(
        model=arguments.model,
        parameters=sum(parameter.numel() for parameter in plain_model.parameters()),
        precision=config.precision,
        mix=arguments.mix,
        samples=arguments.samples,
        sizes=ours.patches,
        tokens=sum(ours.lengths),
        padded_tokens=max(ours.lengths) * arguments.samples,
        caption_tokens=sum(ours.captions.lengths),
        padded_caption_tokens=max(ours.captions.lengths) * arguments.samples,
        ours=[clock for clock, _ in own],
        plain=[clock for clock, _ in theirs],
        ours_cores=[cores for _, cores in own],
        plain_cores=[cores for _, cores in theirs],
        ratio=statistics.median(plain[0] / ours[0] for ours, plain in seconds),
        ratio_of_cores=statistics.median(plain[1] / ours[1] for ours, plain in seconds),
        losses=losses,
        gradient_norms=norms,
    )


def stirred(model: FlagDiT) -> FlagDiT:
    """`model`, with numbers in all that starts at zero, so that every part of it tells in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=_STIRRED)
    return model


class _Ours:
    """A pack of samples, and the step that a run of one process makes of it."""

    def __init__(self, arguments: argparse.Namespace, config: Config, sizes: FlagDiTConfig, mesh: Mesh, model: FlagDiT):
        self.mesh, self.samples, self.step_number = mesh, arguments.samples, 0
        self.patches = patches_of(arguments.mix, self.samples, arguments.resolution)
        side = sizes.patch_size
        shapes = [(1, sizes.in_channels, rows * side, columns * side) for rows, columns in self.patches]
        self.lengths = [token_count(1, height, width, side, True) for _, _, height, width in shapes]
        self.objective = Objective.build(**config.flow.model_dump())
        vae = build_vae(config.vae, sizes.in_channels, mesh.device)
        self.preparer = Preparer(sizes, vae, None, self.objective, Randomness(0), 0.0, mesh)
        generator = torch.Generator().manual_seed(1)
        latents = [torch.randn(shape, generator=generator).to(mesh.device) for shape in shapes]
        lengths = caption_lengths(arguments.mix, self.samples, arguments.text_tokens)
        features = torch.randn(sum(lengths), sizes.cap_feat_dim, generator=generator).to(mesh.device)
        self.captions = Captions.of(features, lengths)
        identities = tuple(Identity(number, 0, 0) for number in range(self.samples))
        self.encoded = Encoded(identities, latents, self.captions, None)
        self.engine = Engine(model, config, mesh, 1)
        self.ema = EMA(self.engine.fragments, config.train.ema_decay)

    def step(self) -> tuple[float, float]:
        """The loss, and the norm of its gradient before clipping."""
        return self.step_on(self.pack())

    def pack(self) -> TrainingPack:
        """With noise and times, which are always the same."""
        return self.preparer.pack(self.encoded)

    def step_on(self, pack: TrainingPack) -> tuple[float, float]:
        self.step_number += 1
        result = train_step(
            self.engine,
            self.ema,
            self.objective,
            [pack],
            global_samples=self.samples,
            learning_rate=_LEARNING_RATE,
            step=self.step_number,
        )
        return result.loss_share, result.outcome.grad_norm

    def padded(self) -> PaddedBatch:
        """The same samples for the plain step."""
        features = self.captions.features.split(self.captions.lengths)
        lengths = torch.tensor(self.captions.lengths, device=self.mesh.device)
        captions = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        mask = torch.arange(captions.shape[1], device=self.mesh.device) < lengths[:, None]
        return PaddedBatch([latent[0] for latent in self.encoded.latents], captions, mask)


def _compared(
    ours: _Ours, plain: PlainTraining, batch: PaddedBatch, precision: str
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Losses and gradient norms of a first step from the same weights, noise and times."""
    pack = ours.pack()
    noise: list[Tensor] = [values[0] for values in unpack(pack.noise, pack.layout)]
    theirs = plain.differentiate(batch, noise, pack.t), plain.gradient_norm()
    plain.update()
    pairs = list(zip(ours.step_on(pack), theirs, strict=True))
    for what, pair, tolerance in zip(("loss", "gradient norm"), pairs, _TOLERANCE[precision], strict=True):
        if not abs(pair[0] - pair[1]) <= tolerance * abs(pair[1]):
            raise RuntimeError(
                f"the two steps do not compute the same: from the same weights and samples our {what} is {pair[0]:.7g} "
                f"and the plain one's {pair[1]:.7g}, further apart than {tolerance:g} of it; no time was measured"
            )
    return pairs[0], pairs[1]


def _seconds(step: Callable[[], object], steps: int, device: torch.device) -> tuple[float, float]:
    """Of one of so many steps in a row: by the clock, and of the cores."""
    _wait_for(device)
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    _wait_for(device)
    return (time.perf_counter() - start) / steps, (time.process_time() - busy) / steps


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def described(row: Row) -> str:
    """Tables: what was measured, and both steps."""
    captions = 1 - row.caption_tokens / row.padded_caption_tokens
    ratios = [theirs / own for own, theirs in zip(row.ours, row.plain, strict=True)]
    what = [
        ("model", f"{row.model}, {row.parameters:,} parameters, {row.precision}"),
        ("batch", f"{row.mix}: {row.samples} samples, {' '.join(f'{h}×{w}' for h, w in row.sizes)} patches"),
        ("tokens", f"{row.tokens:,}; padded {row.padded_tokens:,}, of which {row.padding:.1%} padding"),
        ("caption tokens", f"{row.caption_tokens:,}; padded {row.padded_caption_tokens:,} ({captions:.1%})"),
        ("plain / ours", f"{row.ratio:.2f} ({min(ratios):.2f} – {max(ratios):.2f}, {len(ratios)} pairs)"),
        ("of core seconds", f"{row.ratio_of_cores:.2f}"),
    ]
    steps = []
    for which, (name, seconds, cores, padded) in enumerate(
        (
            ("ours", row.ours, row.ours_cores, row.tokens),
            ("plain", row.plain, row.plain_cores, row.padded_tokens),
        )
    ):
        middle = statistics.median(seconds)
        steps.append(
            (
                name,
                f"{middle:.4g} ({min(seconds):.4g} – {max(seconds):.4g})",
                f"{statistics.median(cores):.4g}",
                f"{row.samples / middle:,.3g}",
                f"{row.tokens / middle:,.0f}",
                f"{padded / middle:,.0f}",
                f"{row.losses[which]:.6g}",
                f"{row.gradient_norms[which]:.6g}",
            )
        )
    columns = ["", "seconds", "core seconds", "samples/s", "tokens/s", "with padding", "first loss", "gradient norm"]
    return f"{record.table(['', ''], what)}\n\n{record.table(columns, steps)}"
