"""Checkpoints on one process: whole or not visible, read by any stretch, refused when damaged."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError

from lumina.checkpoint.load import Checkpoint, latest_checkpoint
from lumina.checkpoint.manifest import MANIFEST, checkpoints_of
from lumina.checkpoint.save import Piece, save_checkpoint
from lumina.config.load import validate
from lumina.parallel.mesh import Mesh, World
from tests.parallel.runs import tiny_config


class OneProcess(Mesh):
    """A mesh of one, without process groups."""

    def barrier(self):
        return None

    def gather(self, value):
        return [value]

    def any(self, flag):
        return flag


@pytest.fixture
def config(tmp_path):
    return validate(tiny_config(tmp_path, tmp_path, checkpoint__keep=2), "test")


def save(tmp_path, config, step=1, pieces=None):
    pieces = pieces if pieces is not None else [Piece("master", "w", (2, 3), 0, torch.arange(6.0))]
    return save_checkpoint(
        tmp_path,
        step,
        pieces,
        config=config,
        optimizer_steps=step,
        data={},
        mesh=OneProcess(World(0, 1, 0), torch.device("cpu")),
    )


def test_any_stretch_of_pieces_comes_back(tmp_path, config):
    values = torch.randn(5, 7)
    flat = values.flatten()
    cuts = [(0, 10), (10, 11), (11, 35)]
    pieces = [Piece(f"kind{i}", "w", (5, 7), a, flat[a:b]) for i, (a, b) in enumerate(cuts)]
    folder = save(tmp_path, config, pieces=pieces)
    # as three ranks would have written them: one kind, three pieces
    manifest = json.loads((folder / MANIFEST).read_text())
    joined = [manifest["tensors"][f"kind{i}"]["w"]["pieces"][0] for i in range(3)]
    manifest["tensors"] = {"master": {"w": {"shape": [5, 7], "pieces": joined}}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.state_dict("master")["w"], values)
    for start, numel in ((0, 35), (9, 3), (10, 1), (12, 23), (34, 1), (3, 0)):
        assert torch.equal(checkpoint.read("master", "w", start, numel), flat[start : start + numel])


def test_a_missing_piece_is_named(tmp_path, config):
    folder = save(tmp_path, config, pieces=[Piece("master", "w", (6,), 0, torch.arange(4.0))])
    with pytest.raises(ValueError, match="master/w has 4 of the elements 0 to 6"):
        Checkpoint(folder).read("master", "w")


def test_the_oldest_go_and_leftovers_are_swept(tmp_path, config):
    leftover = tmp_path / "checkpoints" / ".step_00000009.partial"
    leftover.mkdir(parents=True)
    for step in (1, 2, 3):
        save(tmp_path, config, step)
    assert [f.name for f in checkpoints_of(tmp_path)] == ["step_00000002", "step_00000003"]
    assert not leftover.exists()
    assert latest_checkpoint(tmp_path).manifest.step == 3


def test_an_unfinished_folder_is_not_seen(tmp_path, config):
    folder = save(tmp_path, config)
    shutil.copytree(folder, folder.with_name("step_00000007"))
    (folder.with_name("step_00000007") / MANIFEST).unlink()
    assert latest_checkpoint(tmp_path).manifest.step == 1


def test_a_flipped_bit_is_refused_by_name(tmp_path, config):
    folder = save(tmp_path, config)
    path = folder / "rank_00000.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"rank_00000.safetensors is missing or damaged"):
        Checkpoint(folder).state_dict("master")


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[1, 2"])
def test_a_damaged_manifest_is_refused(tmp_path, config, text):
    folder = save(tmp_path, config)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="damaged, or not written by Lumina"):
        Checkpoint(folder)


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path, config):
    folder = save(tmp_path, config)
    text = (folder / MANIFEST).read_text().replace("rank_00000.safetensors", "../rank_00000.safetensors")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="does not list as a file"):
        Checkpoint(folder).state_dict("master")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_nothing_visible(tmp_path, config, monkeypatch, error):
    save(tmp_path, config, 1)

    def full(*_):
        raise error

    monkeypatch.setattr("lumina.checkpoint.save.save_file", full)
    with pytest.raises(OSError, match=r"step 2 could not be saved .* No space left"):
        save(tmp_path, config, 2)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_the_configuration_comes_along(tmp_path, config):
    assert Checkpoint(save(tmp_path, config)).config == config


def test_a_changed_configuration_is_refused(tmp_path, config):
    folder = save(tmp_path, config)
    (folder / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml is missing or damaged.*remove .*step_00000001"):
        _ = Checkpoint(folder).config
