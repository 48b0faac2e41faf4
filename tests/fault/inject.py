"""Faults, each put into one step of one rank of a real run."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

_INTEGER = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Fault:
    """`kind` is a function of this file.

    step: 0 for what is put into the whole run.
    rank: of the world; None for all.
    tensor: (kind, parameter) of a flipped bit, of what the rank holds; element and bit of it.
    path: of a file that is made.
    """

    kind: str
    step: int
    rank: int | None = None
    tensor: tuple[str, str] = ("", "")
    element: int = 0
    bit: int = 20
    path: str = ""


def fail_at(rank: int | None, step: int, kind: str, **settings: Any) -> Fault:
    """A fault by its name."""
    assert kind in globals(), kind
    return Fault(kind, step, rank, **settings)


@dataclass
class Outcome:
    """What a run with faults came to on one rank: `lumina train`'s exit code and what it said."""

    code: int
    said: str
    changed: tuple[bool, ...]
    """For each step that was taken, whether it changed anything that the optimizer holds, or its count."""


@contextmanager
def faults_in(faults: list[Fault], rank: int) -> Iterator[list[bool]]:
    """Put `faults` into the runs of this process; gives, for each step that is taken, whether it changed anything."""
    from lumina.train import loop

    original, changed = loop.train_step, []
    mine = [fault for fault in faults if fault.rank in (None, rank)]

    def train_step(engine, ema, objective, packs, **rest):
        with ExitStack() as stack:
            for fault in mine:
                if fault.step == rest["step"]:
                    stack.enter_context(globals()[fault.kind](fault, engine, ema, packs))
            before = _state(engine, ema)
            result = original(engine, ema, objective, packs, **rest)
        after = _state(engine, ema)
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        changed.append(not same)
        return result

    with ExitStack() as stack:
        for fault in mine:
            if fault.step == 0:
                stack.enter_context(globals()[fault.kind]())
        stack.enter_context(mock.patch.object(loop, "train_step", train_step))
        yield changed


def train_with_faults(rank: int, trees: list[dict], ports: list[int], faults: list[list[Fault]]) -> list[Outcome]:
    """`lumina train` one after another in this process, each with its faults; a target for `run_ranks`."""
    from lumina.cli import main

    outcomes = []
    for number, (tree, port, of_run) in enumerate(zip(trees, ports, faults, strict=True)):
        os.environ["MASTER_PORT"] = str(port)  # a store of its own for each run
        config = Path(tree["run"]["dir"]).with_name(f"config_{number}_{rank}.yaml")
        config.write_text(yaml.safe_dump(tree))
        with faults_in(of_run, rank) as changed, redirect_stderr(StringIO()) as said:
            code = main(["train", str(config), "--debug"])
        outcomes.append(Outcome(code, said.getvalue(), tuple(changed)))
    return outcomes


def _state(engine, ema) -> dict[str, torch.Tensor]:
    """Bits of masters, moments, working copies and EMA, and the optimizer's count of steps."""
    state = {f"{held.kind} {held.name}": _bits(held.values).clone() for held in engine.held()}
    state |= {f"ema {f.name}": _bits(v).clone() for f, v in zip(ema.fragments, ema.values, strict=True)}
    return state | {"steps": torch.tensor(engine.optimizer_steps)}


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().view(_INTEGER[values.element_size()])


def _trained(engine, name: str) -> torch.Tensor:
    return next(entry.parameter for entry in engine._trained if entry.name == name)


# The faults.


@contextmanager
def nan_in_data(fault, engine, ema, packs):
    packs[0].data[0, 0] = float("nan")
    yield


def _in_errors(change):
    """`change(errors, output)` in place of the squared errors of the loss, where this rank has one."""
    from lumina.flow.loss import Objective

    squared_error = Objective.squared_error

    def changed(self, output, *rest):
        return change(squared_error(self, output, *rest), output)

    return mock.patch.object(Objective, "squared_error", changed)


def infinite_loss(fault, engine, ema, packs):
    """Its gradients are as they were."""
    return _in_errors(lambda errors, output: errors + float("inf"))


def nan_in_gradient(fault, engine, ema, packs):
    """The loss is as it was."""

    def change(errors, output):
        output.register_hook(lambda gradient: gradient * float("nan"))
        return errors

    return _in_errors(change)


def overflow_of_norm(fault, engine, ema, packs):
    """Every gradient is finite, the sum of their squares in fp32 is not."""

    def change(errors, output):
        output.register_hook(lambda gradient: gradient * 1e25)
        return errors

    return _in_errors(change)


@contextmanager
def nan_in_replicated_gradient(fault, engine, ema, packs):
    """Of a parameter that all tensor-parallel ranks have, on one of them."""
    parameter = _trained(engine, "final_layer.linear.bias")
    handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
    hooks = parameter._backward_hooks
    others = {key: hooks.pop(key) for key in list(hooks) if key != handle.id}
    hooks.update(others)  # behind it: the gradient is wrong as it comes out of the backward pass
    yield
    handle.remove()


@contextmanager
def nan_in_summed_gradient(fault, engine, ema, packs):
    """On one replica, after gradients were summed over all."""
    step = engine.step

    def spoiled(learning_rate):
        _trained(engine, "final_layer.linear.bias").grad[0] = float("nan")
        return step(learning_rate)

    with mock.patch.object(engine, "step", spoiled):
        yield


@contextmanager
def spike(fault, engine, ema, packs):
    for pack in packs:
        pack.data.mul_(30)
    yield


@contextmanager
def flip(fault, engine, ema, packs):
    """One bit, of what this rank has of a tensor."""
    flip_bit(engine, ema, fault.tensor, fault.element, fault.bit)
    yield


@contextmanager
def flip_before_update(fault, engine, ema, packs):
    """Too late for the check before the update."""
    step = engine.step

    def spoiled(learning_rate):
        flip_bit(engine, ema, fault.tensor, fault.element, fault.bit)
        return step(learning_rate)

    with mock.patch.object(engine, "step", spoiled):
        yield


@contextmanager
def flip_after_update(fault, engine, ema, packs):
    """Too early for the checksums that are taken next to tell."""
    step = engine.step

    def spoiled(learning_rate):
        outcome = step(learning_rate)
        flip_bit(engine, ema, fault.tensor, fault.element, fault.bit)
        return outcome

    with mock.patch.object(engine, "step", spoiled):
        yield


def flip_bit(engine, ema, tensor: tuple[str, str], element: int, bit: int) -> None:
    kind, name = tensor
    if kind == "ema":
        found = [values for f, values in zip(ema.fragments, ema.values, strict=True) if f.name == name]
    else:
        found = [held.values for held in engine.held() if (held.kind, held.name) == tensor]
    bits = _bits(found[0])
    assert bit < 8 * bits.element_size()
    mask = 1 << bit
    bits[element] ^= mask if bit < 8 * bits.element_size() - 1 else -mask


@contextmanager
def terminate(fault, engine, ema, packs):
    os.kill(os.getpid(), signal.SIGTERM)
    yield


@contextmanager
def stop_file(fault, engine, ema, packs):
    Path(fault.path).touch()
    yield


@contextmanager
def signal_workers(fault, engine, ema, packs):
    """What of Ctrl-C and SIGTERM to the whole group the processes that decode get."""
    workers = multiprocessing.active_children()
    assert workers
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in workers:
            os.kill(worker.pid, number)
    time.sleep(0.2)
    yield


# For the whole run.


@contextmanager
def terminate_at_start():
    """Before there is a process group."""
    from lumina.train import loop

    open_mesh = loop.open_mesh

    def terminated(parallel):
        os.kill(os.getpid(), signal.SIGTERM)
        return open_mesh(parallel)

    with mock.patch.object(loop, "open_mesh", terminated):
        yield


def _when_going_back(act):
    from lumina.train.health import Health

    must_go_back = Health.must_go_back

    def patched(self, step, say):
        if must_go_back(self, step, say):
            act()
            return True
        return False

    return mock.patch.object(Health, "must_go_back", patched)


def die_when_going_back():
    """After it was written down, before it was done."""

    def die():
        raise RuntimeError("killed")

    return _when_going_back(die)


def terminate_when_going_back():
    return _when_going_back(lambda: os.kill(os.getpid(), signal.SIGTERM))
