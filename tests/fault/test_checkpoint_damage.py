"""One flipped bit, or a cut, anywhere in a checkpoint: refused, with the file's name."""

import re
import shutil
from contextlib import contextmanager

import pytest
import torch

from lumina.checkpoint.load import Checkpoint, latest_checkpoint
from lumina.checkpoint.manifest import LATEST, MANIFEST, MANIFEST_HASH
from lumina.checkpoint.save import Piece
from lumina.config.load import validate
from lumina.parallel.fragments import Part
from tests.parallel.runs import metrics_of, tiny_config, train_on
from tests.unit.checkpoints import save, save_on_ranks, whole

FILES = ["config.yaml", MANIFEST, MANIFEST_HASH, "rank_00000.safetensors", "rank_00001.safetensors"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return validate(tiny_config(folder, folder), "test")


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    full = torch.arange(24.0).view(4, 6)
    halves = [Part(1, 0, 3), Part(1, 3, 6)]
    pieces = [
        [Piece(kind, "w", (4, 6), 0, full[:, p.start : p.stop].flatten(), p) for kind in ("master", "ema")]
        for p in halves
    ]
    return save_on_ranks(tmp_path_factory.mktemp("saved"), config, pieces)


def problem_of(folder) -> str:
    """What a run that is about to go on from it finds."""
    try:
        return Checkpoint(folder).damage()
    except ValueError as error:
        return str(error)


def test_the_whole_one_is_whole(saved):
    assert problem_of(saved) == ""


@pytest.mark.parametrize("name", FILES)
def test_every_bit(saved, tmp_path, name):
    """Each byte of the file, and a bit of it in turn."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    whole_file = (saved / name).read_bytes()
    assert len(whole_file) > 60
    for byte in range(len(whole_file)):
        damaged = bytearray(whole_file)
        damaged[byte] ^= 1 << (byte % 8)
        (folder / name).write_bytes(damaged)
        problem = problem_of(folder)
        assert name.split(".")[0] in problem, (byte, problem)
        assert "damaged" in problem or "not a Lumina checkpoint" in problem, (byte, problem)


@pytest.mark.parametrize("name", FILES)
def test_every_length(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "copy")
    whole_file = (saved / name).read_bytes()
    for length in [*range(0, len(whole_file), 7), len(whole_file) - 1]:
        (folder / name).write_bytes(whole_file[:length])
        assert name.split(".")[0] in problem_of(folder), length
    (folder / name).write_bytes(whole_file + b"\0")
    assert name.split(".")[0] in problem_of(folder)
    (folder / name).unlink()
    assert name.split(".")[0] in problem_of(folder)


@pytest.mark.parametrize("byte", [8 + 3, -1])
def test_what_is_read_is_checked_whoever_reads_it(saved, tmp_path, byte):
    """Not only on a resume: a picture is not drawn from damaged weights either."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "rank_00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[byte] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"rank_00001.safetensors is missing or damaged: its (header|tensor ema/w) is"):
        whole(folder)


def test_shares_of_the_checks_cover_everything(saved, tmp_path):
    """Of three ranks, one finds each damage, and the ranks between them read each byte."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    for name in ("rank_00000.safetensors", "rank_00001.safetensors"):
        sound = (saved / name).read_bytes()
        for byte in (9, -100, -1):
            damaged = bytearray(sound)
            damaged[byte] ^= 1
            (folder / name).write_bytes(damaged)
            assert any(Checkpoint(folder).damage(rank, 3) for rank in range(3)), (name, byte)
        (folder / name).write_bytes(sound)
    assert not any(Checkpoint(folder).damage(rank, 3) for rank in range(3))


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[1, 2", "\xff\xfe", "null"])
def test_a_foreign_manifest_is_refused(tmp_path, config, text):
    folder = save(tmp_path, config)
    (folder / MANIFEST_HASH).unlink()
    (folder / MANIFEST).write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"manifest.json: (damaged|not a Lumina checkpoint)"):
        Checkpoint(folder)


def forge(folder, old, new):
    """A manifest that its own hash vouches for."""
    import hashlib

    text = (folder / MANIFEST).read_text()
    changed = re.sub(old, new, text)
    assert changed != text
    (folder / MANIFEST).write_text(changed)
    (folder / MANIFEST_HASH).write_text(f"{hashlib.sha256(changed.encode()).hexdigest()}  {MANIFEST}\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r'"start":0', '"start":-1'),
        (r'"numel":6', '"numel":7'),
        (r'"part":null', '"part":[1,0,4]'),
        (r'"part":null', '"part":[2,0,1]'),
        (r'"part":null', '"part":[0]'),
    ],
)
def test_a_piece_that_does_not_fit_its_tensor_is_refused(tmp_path, config, old, new):
    folder = save(tmp_path, config)
    forge(folder, old, new)
    with pytest.raises(ValueError, match="damaged, or not written by Lumina"):
        Checkpoint(folder)


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path, config):
    folder = save(tmp_path, config)
    forge(folder, r"rank_00000.safetensors", "../rank_00000.safetensors")
    with pytest.raises(ValueError, match="does not list as a file"):
        Checkpoint(folder).state_dict("master")


def test_a_piece_of_another_key_or_length_is_refused(tmp_path, config):
    folder = save(tmp_path, config)
    forge(folder, r'"key":"master/w"', '"key":"master/v"')
    with pytest.raises(ValueError, match="its tensor master/v is not what was saved"):
        Checkpoint(folder).state_dict("master")


def test_a_changed_configuration_is_refused(tmp_path, config):
    folder = save(tmp_path, config)
    (folder / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml is missing or damaged: it is no file of [\d,]+ bytes"):
        _ = Checkpoint(folder).config


def test_one_that_a_run_removed_while_it_was_read_is_not_called_damaged(tmp_path, config):
    checkpoint = Checkpoint(save(tmp_path, config, 1))
    checkpoint.directory.rename(checkpoint.directory.with_name(".step_00000001.removed"))
    with pytest.raises(ValueError, match=r"step_00000001 is gone since it was opened: .*checkpoint\.keep"):
        checkpoint.state_dict("master")


def test_a_folder_without_its_manifest_is_named(tmp_path, config):
    folder = save(tmp_path, config)
    shutil.copytree(folder, folder.with_name("step_00000007"))
    (folder.with_name("step_00000007") / MANIFEST).unlink()
    with pytest.raises(ValueError, match="step_00000007 holds no manifest"):
        latest_checkpoint(tmp_path)


def test_what_another_process_saved_since_is_not_passed_over(digits, tmp_path, monkeypatch):
    """One that was told to stop, and was saving yet, when this one looked for the newest."""
    from lumina.train import loop

    run, run_folder = tmp_path / "run", loop.run_folder
    loop.train(validate(tiny_config(run, digits, train__steps=1), "test"))

    @contextmanager
    def late(folder):
        with run_folder(folder):
            shutil.copytree(run / "checkpoints" / "step_00000001", run / "checkpoints" / "step_00000002")
            yield

    monkeypatch.setattr(loop, "run_folder", late)
    with pytest.raises(ValueError, match=r"another process saved .*step_00000002 while this one started; start again"):
        loop.train(validate(tiny_config(run, digits, train__steps=3), "test"))
    assert [line["step"] for line in metrics_of(run)] == [1]


def test_a_damaged_one_is_set_aside_by_the_run_that_passes_it_over(digits, tmp_path):
    """It is newer than all that are saved next: had it stayed, `keep` would have spared it and removed the others."""
    run = tmp_path / "run"
    train_on(1, tiny_config(run, digits, train__steps=6, checkpoint__every=3))
    damaged = run / "checkpoints" / "step_00000006"
    sound = (damaged / "rank_00000.safetensors").read_bytes()
    (damaged / "rank_00000.safetensors").write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    train_on(1, tiny_config(run, digits, train__steps=5, checkpoint={"every": 1, "keep": 1}))
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == [LATEST, "step_00000005", "step_00000006.damaged"]
    assert latest_checkpoint(run).damage() == ""
    # Nothing of it is lost, and what goes on from there is the run that it was.
    assert (run / "checkpoints" / "step_00000006.damaged" / "config.yaml").is_file()
    train_on(1, tiny_config(run, digits, train__steps=6, checkpoint__keep=1))
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert (latest_checkpoint(run).directory / "rank_00000.safetensors").read_bytes() == sound
