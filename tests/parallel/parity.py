"""Three optimizer steps of a small Flag-DiT under any layout, on packs made here; how far two such runs are apart."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from lumina.config.load import validate
from lumina.config.schema import VaeConfig
from tests.parallel.workers import free_port, run_ranks

STEPS, PACKS = 3, 8
# The gradient of ky_norm.bias is zero in exact arithmetic; Adam turns its rounding noise into steps.
NOISE_ONLY = "ky_norm.bias"
TOLERANCE = 1e-5
AXES = ("pipeline", "ring", "ulysses", "tensor")
LEARNING_RATE = 5e-4

MODEL = {"patch_size": 2, "in_channels": 1, "dim": 64, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16}
TEXT = MODEL | {"cap_feat_dim": 16, "frames": True}
LABEL = MODEL | {"num_classes": 5}

# Frames, height and width of the samples of each pack: mixed resolutions, a video, a sample of one patch, and a pack so
# small that some ranks hold no token of it.
SHAPES = [
    [(1, 8, 8), (1, 4, 12), (1, 6, 6)],
    [(3, 6, 8)],
    [(1, 2, 2), (1, 10, 4), (1, 2, 2), (1, 8, 6)],
    [(1, 12, 10)],
    [(1, 4, 4), (2, 4, 4), (1, 6, 4)],
    [(1, 2, 4)],
    [(1, 6, 10), (1, 6, 10)],
    [(4, 2, 6), (1, 4, 6)],
]


@dataclass(frozen=True)
class Sample:
    """As the loader decodes it."""

    sample_id: int
    pixels: torch.Tensor
    caption: str
    label: int
    epoch: int = 0
    occurrence: int = 0
    latent: None = None
    text: None = None
    null_text: None = None
    encoders: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return str(self.sample_id)


@dataclass(frozen=True)
class Case:
    """A layout to run, and how."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    kind: str = "text"
    at_once: int = 1
    precision: str = "fp32"
    fault: str | None = None

    def __str__(self) -> str:
        layout = dict(self.parallel)
        sizes = [f"{axis}{layout.pop(axis)}" for axis in AXES if axis in layout]
        data = self.world // math.prod(self.parallel.get(axis, 1) for axis in AXES)
        sizes += [f"data{data}"] if data > 1 else []
        sizes += [key if value is True else f"{key}_{value}" for key, value in layout.items()]
        sizes += [f"at_once{self.at_once}"] if self.at_once > 1 else []
        return "-".join([self.kind, *sizes, *([self.fault.replace(" ", "_")] if self.fault else [])])


@dataclass
class Run:
    """What came of a case."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, torch.Tensor]


def packs_of(step: int, kind: str) -> list[list[Sample]]:
    """The packs of a global batch; every step has other samples, and its packs in another order."""
    packs, sample_id = [], 100 * step
    for index in range(PACKS):
        shapes = SHAPES[(index + step) % PACKS]
        pack = []
        for frames, height, width in shapes:
            generator = torch.Generator().manual_seed(sample_id)
            frames = frames if kind == "text" else 1
            pixels = torch.randn(frames, 1, height, width, generator=generator)
            pack.append(Sample(sample_id, pixels, f"sample {sample_id % 7}"[: 4 + sample_id % 5], sample_id % 5))
            sample_id += 1
        packs.append(pack)
    return packs


def run_case(case: Case) -> Run | None:
    """On this rank of a running world; what came of it is told by the first."""
    from lumina.checkpoint.load import model_config
    from lumina.encoders.text import build_text_encoder
    from lumina.encoders.vae import build_vae
    from lumina.flow.loss import Objective
    from lumina.model.flag_dit import FlagDiT
    from lumina.parallel.engine import Engine
    from lumina.parallel.layout import accumulation_steps, check_layout
    from lumina.parallel.mesh import World, close_mesh, open_mesh
    from lumina.parallel.randomness import Randomness
    from lumina.train.ema import EMA
    from lumina.train.prepare import Preparer
    from lumina.train.step import train_step
    from tests.parallel.faults import inject

    config = validate(tree_of(case), "test")
    sizes = model_config(config)
    check_layout(config, sizes, World.from_environment().size)
    mesh = open_mesh(config.parallel)
    with inject(case.fault, mesh):
        objective = Objective.build()
        text = build_text_encoder(config.text) if config.text else None
        prepare = Preparer(sizes, build_vae(VaeConfig(), 1), text, objective, Randomness(3), 0.2, mesh)
        torch.manual_seed(0)
        model = FlagDiT(sizes)
        for name, parameter in model.named_parameters():
            # Far from the initial zeros, behind which most gradients hide.
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.08)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        engine = Engine(model, config, mesh, accumulation_steps(config, mesh.data.size))
        ema = EMA(engine.fragments, 0.9)
        losses, norms = [], []
        for step in range(1, STEPS + 1):
            packs = packs_of(step, case.kind)
            total = sum(map(len, packs))
            mine = packs[mesh.data.rank :: mesh.data.size]
            groups = [
                [s for pack in mine[i : i + case.at_once] for s in pack] for i in range(0, len(mine), case.at_once)
            ]
            result = train_step(
                engine,
                ema,
                objective,
                [prepare(group) for group in groups],
                global_samples=total,
                learning_rate=LEARNING_RATE,
                step=step,
            )
            losses.append(mesh.sum([result.loss_share])[0])
            norms.append(result.outcome.grad_norm)
        parameters = {}
        for name, shape in shapes.items():
            whole = torch.zeros(shape)
            for fragment, owned in zip(engine.fragments, engine.owned, strict=True):
                if owned and fragment.name == name:
                    fragment.place_in(whole, fragment.master)
            mesh.sum_to_first(whole)
            parameters[name] = whole
    first = mesh.is_first
    engine.close()
    close_mesh(mesh)
    return Run(losses, norms, parameters) if first else None


def tree_of(case: Case) -> dict[str, Any]:
    text = case.kind == "text"
    return {
        "run": {"dir": "unused"},
        "model": TEXT if text else LABEL,
        **({"text": {"encoder": "bytes", "width": 16, "max_tokens": 8}} if text else {}),
        "data": {"shards": ["unused"]},
        "train": {
            "steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "global_batch_packs": PACKS,
            "packs_per_forward": case.at_once,
            # Above this the clipping works at every step; Adam's epsilon as in tests/parallel/runs.py.
            "clip_norm": 0.5,
            "adam_epsilon": 1e-5,
        },
        "precision": case.precision,
        "parallel": {"zero_stage": 1 if case.precision == "bf16" else 0} | case.parallel,
    }


def run_cases(rank: int, cases: list[Case], ports: list[int]) -> list[tuple[list, list, dict] | None]:
    """One after another in the same processes, whose start costs more than these runs do."""
    runs = []
    for case, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a store of its own for each run
        run = run_case(case)
        # As bytes: torch would send each tensor through a file descriptor of its own.
        runs.append(run and (run.losses, run.norms, {k: v.numpy().tobytes() for k, v in run.parameters.items()}))
    return runs


def run_all(cases: list[Case]) -> list[Run]:
    """Cases of one world size, on that many ranks."""
    (world,) = {case.world for case in cases}
    told = run_ranks(world, run_cases, cases, [free_port() for _ in cases])[0]
    runs = []
    for losses, norms, values in told:
        parameters = {k: torch.frombuffer(bytearray(v), dtype=torch.float32) for k, v in values.items()}
        runs.append(Run(losses, norms, parameters))
    return runs


def differences(found: Run, expected: Run) -> dict[str, float]:
    """How far apart: relative for losses and norms, relative L2 for each parameter.

    ky_norm.bias, whose gradient is zero but for rounding: as a share of the steps that Adam can have made of it.
    """
    result = {}
    for step, (a, b) in enumerate(zip(found.losses, expected.losses, strict=True), 1):
        result[f"loss {step}"] = abs(a - b) / abs(b)
    for step, (a, b) in enumerate(zip(found.norms, expected.norms, strict=True), 1):
        result[f"norm {step}"] = abs(a - b) / abs(b)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        apart = found.parameters[name] - value
        if name.endswith(NOISE_ONLY):
            # The tolerance where Adam has gone as far as it can.
            result[name] = TOLERANCE * float(apart.abs().max()) / (STEPS * LEARNING_RATE)
        else:
            result[name] = float(apart.norm() / value.norm())
    return result


# What public trainers get wrong most: reported by name.
NAMED = {
    "embedders": ("x_embedder", "t_embedder", "cap_embedder", "y_embedder"),
    "gates": ("attention.gate",),
    "learned tokens": ("eol_token", "nextframe_token"),
    "modulation": ("adaLN_modulation",),
    "KQ-norm": ("q_norm", "k_norm"),
}


def report(apart: dict[str, float]) -> str:
    """The worst difference of each sort, and the worst of all by name."""
    worst = {sort: max((v for k, v in apart.items() if k.startswith(sort)), default=0.0) for sort in ("loss", "norm")}
    for sort, parts in NAMED.items():
        worst[sort] = max((v for k, v in apart.items() if any(part in k for part in parts)), default=0.0)
    name = max(apart, key=lambda key: apart[key])
    return " · ".join(f"{sort} {value:.0e}" for sort, value in worst.items()) + f" · {name} {apart[name]:.0e}"
