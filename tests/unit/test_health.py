"""The maths of health checks: checksums, who differs, spikes, what is left out, when a check is due."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.parallel.fragments import Held
from lumina.train import bits
from lumina.train.bits import Watch, checksum, checksums, dissenters
from lumina.train.health import LeftOut, SpikeDetector, last_values, read_left_out
from lumina.train.stop import StopFile, StopSignals

NUMPY = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float64: np.uint64, torch.uint8: np.uint8}


def numbers(count, dtype, seed=0):
    drawn = torch.randint(0, 256, (count * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8).view(dtype)  # any bits, infinities and NaN among them


# Checksums.


@given(
    dtype=st.sampled_from(list(NUMPY)),
    start=st.integers(0, 9),
    count=st.integers(0, 70),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_the_checksum_is_a_sum_of_integers(dtype, start, count, seed):
    """Of eight bytes at a time where they lie at a multiple of eight of the storage, of elements at the ends."""
    values = numbers(start + count, dtype, seed)[start:]
    size = dtype.itemsize
    data = values.view(torch.uint8).numpy().tobytes()
    head = min(-start * size % 8, len(data))
    middle = (len(data) - head) // 8 * 8
    signed = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[size]
    expected = sum(map(int, np.frombuffer(data[head : head + middle], np.int64)))
    for end in (data[:head], data[head + middle :]):
        expected += sum(map(int, np.frombuffer(end, signed)))
    assert int(checksum(values)) % 2**64 == expected % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_every_single_flipped_bit_changes_it(dtype, start):
    values = numbers(start + 9, dtype)[start:]
    before = int(checksum(values))
    integers = values.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
    for element in range(len(values)):
        kept = integers[element].item()
        for bit in range(8 * dtype.itemsize):
            raw = np.array([kept]).astype(f"i{dtype.itemsize}").view(f"u{dtype.itemsize}") ^ (1 << bit)
            integers[element] = int(raw.astype(f"u{dtype.itemsize}").view(f"i{dtype.itemsize}")[0])
            assert int(checksum(values)) != before
        integers[element] = kept
    assert int(checksum(values)) == before


def test_zero_has_two_signs_and_order_of_tensors_is_kept():
    assert checksums([torch.zeros(3), -torch.zeros(3)]).unique().numel() == 2
    tensors = [numbers(n, torch.float32, n) for n in (5, 0, 8)]
    assert checksums(tensors).tolist() == [int(checksum(values)) for values in tensors]
    assert checksums([]).shape == (0,)
    shaped = numbers(12, torch.float32).view(3, 4)
    assert checksum(shaped) == checksum(shaped.view(-1))


# When, and what, the watch finds.


class Clock:
    """Time passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def watch_of(values, every, clock, monkeypatch=None, cost=0.0):
    """With `monkeypatch`, of much: half a check takes `cost` seconds."""
    held = [Held("master", f"p{i}", value, False) for i, value in enumerate(values)]
    watch = Watch(lambda: iter(held), every, clock)
    if monkeypatch is not None:
        monkeypatch.setattr(bits, "_SMALL", 0)

        def slow(tensors):
            clock.now += cost
            return checksums(tensors)

        monkeypatch.setattr(bits, "checksums", slow)
    return watch


def test_what_changed_is_named_and_nothing_else():
    values = [numbers(n, torch.float32, n) for n in (4, 7, 5)]
    watch = watch_of(values, 50, Clock())
    assert watch.changed() == []  # nothing was sealed yet
    watch.seal()
    assert watch.changed() == []
    values[1].view(torch.int32)[6] ^= 1
    assert [held.name for held in watch.changed()] == ["p1"]
    watch.seal()
    assert watch.changed() == []
    assert watch.sums().tolist() == checksums(values).tolist()


@pytest.mark.parametrize(
    ("cost", "every", "expected"),
    [
        (0.0375, 50, 10),  # two halves of 37.5 ms in steps of 1 s: each tenth is 0.75%
        (0.0003, 50, 1),
        (10.0, 7, 7),  # too dear, but never later than asked for
        (10.0, 1, 1),
    ],
)
def test_a_stretch_is_watched_as_often_as_its_share_allows(monkeypatch, cost, every, expected):
    clock = Clock()
    watch = watch_of([torch.zeros(2)], every, clock, monkeypatch, cost)
    watched = []
    for step in range(60):
        before = clock.now
        watch.seal()
        clock.now += 1.0
        watch.changed()
        if clock.now > before + 1.0:
            watched.append(step)
    steps = np.diff(watched)
    assert watched[0] == 0
    assert abs(steps[1:].mean() - expected) <= 0.15 * expected
    assert steps.max() <= every


def test_little_is_watched_always(monkeypatch):
    clock = Clock()
    watch = watch_of([torch.zeros(2)], 50, clock, monkeypatch, cost=10.0)
    monkeypatch.setattr(bits, "_SMALL", 8)
    for _ in range(3):
        watch.seal()
        before = clock.now
        watch.changed()
        assert clock.now > before


# Who differs.


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([[1, 2], [1, 2], [1, 2]], {}),
        ([[1, 2], [1, 3], [1, 2]], {1: [[1]]}),
        ([[9, 2], [1, 3], [1, 2]], {0: [[0]], 1: [[1]]}),
        ([[1, 2], [1, 3]], {1: [[0], [1]]}),
        ([[1], [1], [2], [2]], {0: [[0, 1], [2, 3]]}),
        ([[1], [2], [3]], {0: [[0], [1], [2]]}),
        ([[1], [1], [1], [2], [3], [1]], {0: [[3], [4]]}),
    ],
)
def test_who_differs(sums, expected):
    assert dissenters(torch.tensor(sums)) == expected


# Spikes.


@given(
    st.lists(st.floats(0.5, 100), min_size=12, max_size=40),
    st.integers(8, 12),
    st.sampled_from([0.5, 3.0, 10.0]),
)
@settings(max_examples=100)
def test_the_limit_is_the_documented_formula(values, window, factor):
    detector = SpikeDetector(factor, window)
    for i, value in enumerate(values):
        limit = math.inf
        if i >= window:
            last = np.array(values[i - window : i])
            middle = np.median(last)
            limit = middle + factor * max(1.4826 * np.median(np.abs(last - middle)), 0.01 * abs(middle))
        assert detector.limit == pytest.approx(limit, rel=1e-12)
        exact = detector.limit
        assert detector.judge(value) == (exact if value > exact else None)


def test_a_spike_does_not_move_the_limit_and_a_new_level_does():
    detector = SpikeDetector(10.0, 8, [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.02])
    before = detector.limit
    assert detector.judge(50.0) == before
    assert detector.limit < 2
    verdicts = [detector.judge(50.0 + i % 3) is not None for i in range(12)]
    assert verdicts[0]
    assert not any(verdicts[-4:])


def test_a_constant_loss_does_not_spike_of_a_ripple():
    detector = SpikeDetector(10.0, 8, [2.0] * 8)
    assert detector.limit == pytest.approx(2.2)
    assert detector.judge(2.1) is None


def test_a_rerun_has_the_window_of_the_first(tmp_path):
    """All that a resume knows of the values before it is in metrics.jsonl, to the last bit."""
    values = np.random.default_rng(0).random(20).tolist()
    lines = [{"step": i, "loss": v, "grad_norm": 1.0, "skipped": False} for i, v in enumerate(values, 1)]
    lines[3] |= {"loss": None, "skipped": True}
    lines[5] |= {"skipped": True}  # its loss was finite, its gradients were not
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    trained = [v for i, v in enumerate(values[:16]) if i not in (3, 5)]
    assert last_values(tmp_path, "loss", 16, 12) == trained[-12:]
    assert last_values(tmp_path, "loss", 16, 100) == trained
    assert last_values(tmp_path, "grad_norm", 3, 100) == [1.0] * 3
    assert last_values(tmp_path / "none", "loss", 3, 4) == []


# What is left out.

ENTRY = {"first": 9, "last": 11, "checkpoint": 8, "spike_of": "loss", "value": 3.5, "limit": 2.0}


def test_the_record_is_read_as_it_was_written(tmp_path):
    assert read_left_out(tmp_path) == []
    entries = [LeftOut(**ENTRY), LeftOut(**ENTRY | {"first": 13, "last": 13, "checkpoint": 12})]
    (tmp_path / "skipped_batches.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in entries))
    assert read_left_out(tmp_path) == entries


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"first": 9', "line 2: no record of batches left out"),
        ("[]", "line 2"),
        (json.dumps(ENTRY | {"first": "9"}), "line 2.*first"),
        (json.dumps(ENTRY | {"more": 1}), "line 2.*more"),
        (json.dumps(ENTRY | {"last": 7}), r"checkpoint 8 < first 9 ≤ last 7 does not hold"),
        (json.dumps(ENTRY | {"checkpoint": 9}), r"does not hold"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_by_line(tmp_path, line, words):
    (tmp_path / "skipped_batches.jsonl").write_text(f"{json.dumps(ENTRY)}\n{line}\n")
    with pytest.raises(ValueError, match=words):
        read_left_out(tmp_path)


# Being asked to stop.


def test_a_second_ctrl_c_does_not_wait():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_file_that_stays_is_said(tmp_path):
    file = StopFile(tmp_path)
    assert not file.asked()
    assert file.remove() == ""
    (tmp_path / "stop").touch()
    assert file.asked()
    assert file.remove() == ""
    assert not file.asked()
    (tmp_path / "stop").mkdir()
    assert "stop cannot be removed" in file.remove()
