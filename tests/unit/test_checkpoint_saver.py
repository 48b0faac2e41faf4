"""The saver: whole or not visible, one save in flight, failures counted and survived."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from lumina.checkpoint import save as saving
from lumina.checkpoint.load import Checkpoint, latest_checkpoint, newest_whole_checkpoint
from lumina.checkpoint.manifest import LATEST, checkpoints_of
from lumina.checkpoint.save import Piece, Saver
from lumina.config.load import validate
from lumina.parallel.activity import Phase
from tests.parallel.runs import tiny_config
from tests.parallel.workers import PATIENCE
from tests.unit.checkpoints import on_ranks, one_tensor, save, save_on_ranks, state_of, whole


def config_of(folder: Path, **checkpoint):
    return validate(tiny_config(folder, folder, **{f"checkpoint__{k}": v for k, v in checkpoint.items()}), "test")


@pytest.fixture
def config(tmp_path):
    return config_of(tmp_path, keep=2)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_oldest_go_and_leftovers_are_swept(tmp_path, config):
    for name in (".step_00000009.partial", ".step_00000004.removed"):
        (tmp_path / "checkpoints" / name / "deeper").mkdir(parents=True)
    for step in (1, 2, 3):
        save(tmp_path, config, step)
    assert names(tmp_path) == [LATEST, "step_00000002", "step_00000003"]
    assert latest_checkpoint(tmp_path).manifest.step == 3
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step_00000003\n"


def test_every_mth_stays(tmp_path):
    for step in range(2, 16, 2):
        save(tmp_path, config_of(tmp_path, keep=2, keep_every=6), step)
    assert [folder.name[-2:] for folder in checkpoints_of(tmp_path)] == ["06", "12", "14"]


def test_a_step_that_comes_by_again_replaces_the_old_one(tmp_path, config):
    save(tmp_path, config, 5)
    save(tmp_path, config, 5, [Piece("master", "w", (2,), 0, torch.tensor([7.0, 8.0]))])
    assert Checkpoint(checkpoints_of(tmp_path)[0]).read("master", "w").tolist() == [7.0, 8.0]
    assert names(tmp_path) == [LATEST, "step_00000005"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_cannot_be_tidied_makes_no_save_a_failed_one(tmp_path, monkeypatch, asynchronous):
    """Neither the pointer nor an old checkpoint that stays: four in a row are saved, told, and no reason to stop."""
    config, rename = config_of(tmp_path, keep=1, **{"async": asynchronous}), Path.rename

    def refused(path, target):
        if path.name == "step_00000001" or target.name == LATEST:
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)

    def work(mesh):
        saver, told = Saver(tmp_path, config, mesh), []
        for step in (1, 2, 3, 4):
            values = torch.tensor([float(mesh.world.rank)])
            told.append(saver.start(state_of(step), [Piece("master", "w", (2,), mesh.world.rank, values)]))
        told.append(saver.finish())
        saver.close()
        return told[int(asynchronous) :][:4]

    first, second = on_ranks(2, work)
    assert [re.findall(r"step_0000000\d|latest", text) for text in first] == [
        ["step_00000001", "latest"],
        *([f"step_0000000{step}", "latest", "step_00000001"] for step in (2, 3, 4)),
    ]
    assert second == [""] * 4
    assert [folder.name for folder in checkpoints_of(tmp_path)] == ["step_00000001", "step_00000004"]


def test_a_checkpoint_elsewhere_goes_without_a_trace_here(tmp_path):
    """One that was moved to another disk, with a link in its place."""
    config = config_of(tmp_path, keep=1)
    folder = save(tmp_path, config, 1)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert Checkpoint(folder).damage() == ""
    save(tmp_path, config, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [LATEST, "step_00000002"]
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_what_the_manifest_says_beside_the_tensors(tmp_path, config):
    checkpoint = Checkpoint(save(tmp_path, config, 4))
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.optimizer_steps, manifest.model) == (4, 4, {"dim": 16})
    assert manifest.software["torch"] == torch.__version__
    assert checkpoint.config == config


class Gate:
    """Holds the writing thread until it is opened; counts the files."""

    def __init__(self, monkeypatch):
        self.open, self.files, write = threading.Event(), [], saving._write

        def gated(path, pieces, *rest):
            assert self.open.wait(timeout=PATIENCE)
            self.files.append(path)
            return write(path, pieces, *rest)

        monkeypatch.setattr(saving, "_write", gated)


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    gate, config = Gate(monkeypatch), config_of(tmp_path, **{"async": True})

    def work(mesh):
        saver, values = Saver(tmp_path, config, mesh), torch.arange(4.0)
        assert saver.ready
        saver.start(state_of(1), [Piece("master", "w", (4,), 0, values)])
        saver.before_update()
        values += 100  # training goes on
        seen = [saver.ready, saver.advance(False), len(checkpoints_of(tmp_path))]
        gate.open.set()
        saver.start(state_of(2), [Piece("master", "w", (4,), 0, values)])  # waits for the first: one is in flight
        seen.append(len(checkpoints_of(tmp_path)))
        while not saver.ready:
            pass
        seen += [saver.advance(True), saver.ready]
        saver.finish()
        saver.close()
        return seen

    assert on_ranks(1, work) == [[False, "", 0, 1, "", True]]
    first, second = (Checkpoint(folder).read("master", "w").tolist() for folder in checkpoints_of(tmp_path))
    assert first == [0.0, 1.0, 2.0, 3.0]
    assert second == [100.0, 101.0, 102.0, 103.0]


def test_an_update_waits_for_the_copies(tmp_path, monkeypatch):
    """They are made while the next pass runs, and what they are made of is about to change."""
    may_copy, copies_of, order = threading.Event(), Saver._copies_of, []

    def late(self, pieces):
        assert may_copy.wait(timeout=PATIENCE)
        yield from copies_of(self, pieces)
        order.append("copied")

    monkeypatch.setattr(Saver, "_copies_of", late)

    def work(mesh):
        saver, values = Saver(tmp_path, config_of(tmp_path, **{"async": True}), mesh), torch.arange(4.0)
        asked = time.perf_counter()
        saver.start(state_of(1), [Piece("master", "w", (4,), 0, values)])
        answered, began = time.perf_counter(), saver.take_seconds()

        wait, waited = saver._copied.wait, []

        def waits():
            waited.append(time.perf_counter())
            may_copy.set()
            wait()
            waited.append(time.perf_counter())

        monkeypatch.setattr(saver._copied, "wait", waits)
        before = time.perf_counter()
        saver.before_update()
        after = time.perf_counter()
        order.append("update")
        may_copy.set()
        values += 100
        held_up = saver.take_seconds()
        saver.finish()
        saver.close()
        return (began, answered - asked), (waited[1] - waited[0], held_up, after - before)

    (((began, start), (waited, held_up, update)),) = on_ranks(1, work)
    assert order == ["copied", "update"]
    assert 0 < began <= start
    assert 0 < waited <= held_up <= update
    assert Checkpoint(checkpoints_of(tmp_path)[0]).read("master", "w").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_asynchronous_save_becomes_visible_when_all_have_written(tmp_path, monkeypatch):
    gate, config = Gate(monkeypatch), config_of(tmp_path, **{"async": True})

    def work(mesh):
        saver = Saver(tmp_path, config, mesh)
        half = Piece("master", "w", (4,), 2 * mesh.world.rank, torch.full((2,), float(mesh.world.rank)))
        saver.start(state_of(1), [half])
        saver.advance(False)
        before = len(checkpoints_of(tmp_path))
        mesh.barrier()
        gate.open.set()
        while not saver.ready:
            pass
        mesh.barrier()
        saver.advance(True)
        saver.close()
        return before

    assert on_ranks(2, work) == [0, 0]
    assert Checkpoint(checkpoints_of(tmp_path)[0]).read("master", "w").tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_is_told_and_survived_three_in_a_row_stop(tmp_path, monkeypatch, asynchronous):
    """On the second of two ranks, so that the first hears of it."""
    config, broken = config_of(tmp_path, keep=9, **{"async": asynchronous}), [2, 4, 5, 6]
    opened = saving.TensorFile

    def full(path, *arguments, **keywords):
        if path.name == "rank_00001.safetensors" and int(path.parent.name[6:14]) in broken:
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(saving, "TensorFile", full)

    def work(mesh):
        saver, told = Saver(tmp_path, config, mesh), []
        try:
            for step in range(1, 9):
                piece = Piece("master", "w", (2,), mesh.world.rank, torch.tensor([float(step)]))
                problem = saver.start(state_of(step), [piece])
                told.append((step, bool(problem)))
                if mesh.is_first and problem:
                    assert "rank 1: rank_00001.safetensors: No space left on device" in problem
        except OSError as error:
            return told, str(error)
        finally:
            saver.close()

    first, second = on_ranks(2, work)
    # Of an asynchronous save one hears at the next.
    late = int(asynchronous)
    assert first[0] == second[0] == [(step, step - late in broken) for step in range(1, 6 + late)]
    assert "3 saves in a row failed: the checkpoint of step 6" in first[1]
    assert "rank 0 says why" in second[1]
    assert [f.name for f in checkpoints_of(tmp_path)] == ["step_00000001", "step_00000003"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert all(not Checkpoint(folder).damage() for folder in checkpoints_of(tmp_path))


def test_the_last_save_must_succeed(tmp_path, config, monkeypatch):
    save(tmp_path, config, 1)
    monkeypatch.setattr(saving, "TensorFile", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match=r"step 2 could not be saved .* Input/output error; what was saved before is as"):
        save(tmp_path, config, 2)
    assert names(tmp_path) == [LATEST, "step_00000001"]


def test_a_folder_that_cannot_be_made(tmp_path, config):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="step 1 could not be saved"):
        save(tmp_path, config)


def test_a_save_that_goes_on_is_progress(tmp_path, config):
    """For the watchdog, which would take a long one for a rank that has stopped."""
    marks = []

    def work(mesh):
        saver = Saver(tmp_path, config, mesh)
        pieces = [Piece("master", f"w{i}", (2,), 0, torch.ones(2)) for i in range(5)]
        mesh.activity.enter(Phase.SAVE)
        saver.start(state_of(1), pieces)
        marks.append(mesh.activity.progress)
        saver.close()

    on_ranks(1, work)
    assert marks == [1 + 5]


def test_ranks_without_pieces_write_no_file(tmp_path, config):
    folder = save_on_ranks(tmp_path, config, [one_tensor(), []])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "manifest.sha256",
        "rank_00000.safetensors",
    ]
    assert whole(folder)["master/w"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_sha256sum_checks_the_manifest(tmp_path, config):
    import subprocess

    folder = save(tmp_path, config)
    assert subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=folder, capture_output=True).returncode == 0
    (folder / "manifest.json").write_text(json.dumps({}))
    assert subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=folder, capture_output=True).returncode == 1


def test_the_newest_that_is_whole_is_taken_by_all_ranks(tmp_path):
    """Each rank checks a share: which rank meets the damage makes no difference."""
    config = config_of(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        save(tmp_path, config, step, [Piece("master", f"w{i}", (5,), 0, torch.randn(5)) for i in range(6)])
    folders = checkpoints_of(tmp_path)
    flip(folders[3] / "rank_00000.safetensors", -1)  # the last tensor
    (folders[2] / "manifest.json").unlink()

    def work(mesh):
        checkpoint, problems = newest_whole_checkpoint(tmp_path, mesh)
        return checkpoint.manifest.step, problems

    results = on_ranks(4, work)
    assert [step for step, _ in results] == [2, 2, 2, 2]
    newest, before = results[0][1].values()
    assert list(results[0][1]) == [folders[3], folders[2]]
    assert "step_00000004/rank_00000.safetensors is missing or damaged: its tensor master/w5" in newest
    assert "step_00000003 holds no manifest.json" in before

    real_open = Path.open

    def lost(path, *arguments, **keywords):
        if path == folders[1] / "rank_00000.safetensors":
            raise OSError(5, "Input/output error", str(path))
        return real_open(path, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:  # a disk that cannot read it: on each rank that meets it
        patch.setattr(Path, "open", lost)
        assert [
            checkpoint.manifest.step for checkpoint, _ in on_ranks(2, lambda m: newest_whole_checkpoint(tmp_path, m))
        ] == [1, 1]

    for folder in folders[:2]:
        flip(folder / "config.yaml", 0)
    with pytest.raises(ValueError, match=r"every checkpoint of .* is damaged, and training does not start anew"):
        on_ranks(2, work)


def flip(path: Path, byte: int, bit: int = 0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
