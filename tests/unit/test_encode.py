"""`lumina data encode` and `show`: a run on what was encoded beforehand is the run on the pictures."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lumina.cli import main
from lumina.config.load import dump_config, validate
from lumina.data.index import Index
from lumina.data.write import write_shards
from lumina.encoders.vae import build_vae
from tests.parallel.runs import metrics_of, tiny_config, train_on
from tests.unit.test_encoders_vae import small_vae


def picture(number, height, width):
    stream = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 pictures of three sizes in two shards."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    sizes = ((16, 16), (16, 24), (40, 16))
    samples = [{"__key__": f"p{i:02d}", "png": picture(i, *sizes[i % 3]), "txt": f"photo {i}"} for i in range(12)]
    write_shards(folder, samples, name="photos", samples_per_shard=7)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    small_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def tree(tmp_path, photos, autoencoder):
    """A run on the pictures: an autoencoder of factor 4, captions hashed."""
    made = tiny_config(tmp_path / "run", photos, data__caption_dropout=0.4, train__tokens_per_pack=60)
    made["model"] = made["model"] | {"in_channels": 4}
    return made | {"vae": {"model": str(autoencoder), "scale": 0.5}}


def file_of(tmp_path, tree):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(validate(tree, "test")))
    return str(path)


def encode(tmp_path, tree, out, *more):
    return main(["data", "encode", file_of(tmp_path, tree), str(out), *more])


def arrays(shard):
    """Members of a shard: (key, extension) → array or text."""
    found = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            content = tar.extractfile(member).read()
            found[key, extension] = np.load(io.BytesIO(content)) if extension.endswith("npy") else content
    return found


@pytest.mark.slow
def test_a_run_on_latents_is_the_run_on_pictures(tmp_path, tree):
    out = tmp_path / "encoded"
    assert encode(tmp_path, tree, out, "--dtype", "fp32") == 0
    ready = tree | {"run": {"dir": str(tmp_path / "ready"), "seed": 3}, "data": tree["data"] | {"shards": [str(out)]}}
    bare = ready | {
        "run": {"dir": str(tmp_path / "bare"), "seed": 3},
        "vae": {"model": "none", "factor": 4},
        "text": tree["text"] | {"encoder": "none"},
    }
    train_on(1, tree, ready, bare)
    train_on(2, bare | {"run": {"dir": str(tmp_path / "ring"), "seed": 3}, "parallel": {"ring": 2, "zero_stage": 0}})
    pictures = [line["loss"] for line in metrics_of(tmp_path / "run")]
    for name in ("ready", "bare", "ring"):
        found = metrics_of(tmp_path / name)
        assert [line["loss"] for line in found] == pytest.approx(pictures, rel=1e-5), name
        assert [line["tokens"] for line in found] == [line["tokens"] for line in metrics_of(tmp_path / "run")]
    assert len(set(pictures)) == len(pictures)


def test_what_is_written(tmp_path, tree, photos, capsys):
    out = tmp_path / "encoded"
    assert encode(tmp_path, tree, out, "--crops", "2") == 0
    assert "12 samples encoded" in capsys.readouterr().out
    config = validate(tree, "test")
    vae = build_vae(config.vae, 4)
    (first, second), index = sorted(out.glob("*.tar")), Index.open([out])
    assert [path.name for path in (first, second)] == ["photos-000000-000000.tar", "photos-000001-000001.tar"]
    assert index.column("kind").tolist() == [3] * 12
    assert index.column("height").tolist()[:3] == [4, 4, 10]
    members = arrays(first)
    for number in (0, 1, 2):
        latent = members[f"p{number:02d}", "latent.npy"]
        levels = np.asarray(Image.open(io.BytesIO(Index.open([photos]).read(number)["png"])))
        pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean, deviation = vae.moments(pixels)
        expected = torch.cat((mean, deviation), 1).numpy()
        assert latent.shape == (2, 1, 8, *expected.shape[2:])
        assert latent.dtype == np.float16
        np.testing.assert_allclose(latent[0], expected, rtol=2e-3, atol=2e-3)
        assert np.array_equal(latent[0], latent[1]), "the middle is cut out each time"
    assert members["p01", "txt"] == b"photo 1"
    assert members["p01", "text.npy"].shape[1] == 16
    assert members["p01", "text.null.npy"].shape == (1, 16)
    assert json.loads(members["p01", "json"])["encoders"]["vae"] == vae.describe()


def test_random_crops_differ(tmp_path, tree):
    tree["data"] = tree["data"] | {"crop": "random", "flip": True, "resolution": 8}
    assert encode(tmp_path, tree, tmp_path / "encoded", "--crops", "3") == 0
    found = arrays(next((tmp_path / "encoded").glob("*.tar"))).items()
    latents = [x for (_, extension), x in found if extension == "latent.npy"]
    assert any(not np.array_equal(of[0], of[1]) for of in latents)


@pytest.mark.slow
def test_ranks_share_the_work_and_a_kill_loses_a_shard_at_most(tmp_path, tree):
    """Four commands, as four processes would run them, two of them after the others stopped."""
    path, whole, shared = file_of(tmp_path, tree), tmp_path / "whole", tmp_path / "shared"
    assert main(["data", "encode", path, str(whole)]) == 0
    code = "import sys; from lumina.cli import main; sys.exit(main(sys.argv[1:]))"

    def rank(number):
        import os

        environment = os.environ | {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        run = [sys.executable, "-c", code, "data", "encode", path, str(shared)]
        return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout

    assert "5 samples encoded" in rank(1)
    assert [p.name for p in shared.glob("*.tar")] == ["photos-000001-000001.tar"]
    assert "7 samples encoded" in rank(0)
    assert "0 samples encoded" in rank(1)
    for one, other in zip(sorted(whole.glob("*.tar")), sorted(shared.glob("*.tar")), strict=True):
        assert one.read_bytes() == other.read_bytes()
    (shared / "photos-000000-000000.index.safetensors").unlink()  # killed between the two
    assert "7 samples encoded" in rank(0)
    assert sorted(p.name for p in shared.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_other_settings_are_refused(tmp_path, tree, capsys):
    out = tmp_path / "encoded"
    assert encode(tmp_path, tree, out) == 0
    for more, sentence in (
        (["--crops", "2"], "was made with crops=1, not 2"),
        (["data.resolution=8"], "was made with resolution=None, not 8"),
        (["vae.scale=0.25"], "was made with vae="),
    ):
        capsys.readouterr()
        assert encode(tmp_path, tree, out, *more) == 2
        assert sentence in capsys.readouterr().err
    stages = tree | {"data": tree["data"] | {"stages": [{"from_step": 0, "resolution": 16}]}}
    assert encode(tmp_path, stages, tmp_path / "other") == 2
    assert "encode each resolution into a folder of its own" in capsys.readouterr().err


def test_latents_are_not_encoded_again_nor_trained_on_with_another_encoder(tmp_path, tree, capsys):
    out = tmp_path / "encoded"
    assert encode(tmp_path, tree, out) == 0
    again = tree | {"data": tree["data"] | {"shards": [str(out)]}}
    assert encode(tmp_path, again, tmp_path / "twice") == 2
    assert "holds latents already" in capsys.readouterr().err
    for change, sentence in (
        ({"vae": tree["vae"] | {"scale": 0.25}}, "was encoded with .*, but the run's vae is"),
        ({"text": tree["text"] | {"max_tokens": 4}}, "was encoded with .*, but the run's text is"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train_here(again | change)
    with pytest.raises(ValueError, match=r"vae\.model=none takes latents made by `lumina data encode`, not pixels"):
        train_here(tree | {"vae": {"model": "none", "factor": 4}})


def train_here(tree):
    from lumina.train.loop import train

    train(validate(tree, "test"))


def test_bad_samples_are_left_out_within_the_budget(tmp_path, tree, capsys):
    samples = [{"__key__": f"p{i:02d}", "png": picture(i, 16, 16), "txt": "x"} for i in range(30)]
    samples[7]["png"] = b"\x89PNG\r\n\x1a\nnothing more"
    write_shards(tmp_path / "bad", samples, name="bad", samples_per_shard=100)
    tree["data"] = tree["data"] | {"shards": [str(tmp_path / "bad")], "bad_samples": 0.1}
    assert encode(tmp_path, tree, tmp_path / "encoded") == 0
    said = capsys.readouterr()
    assert "29 samples encoded" in said.out
    assert "1 left out" in said.out
    assert "sample p07 of bad-000000.tar is left out: picture does not decode" in said.err
    tree["data"] = tree["data"] | {"bad_samples": 0.0}
    assert encode(tmp_path, tree, tmp_path / "strict") == 2
    assert "1 of 30 samples cannot be read, more than data.bad_samples=0.0 allows" in capsys.readouterr().err


def test_show(tmp_path, tree, capsys):
    path, sheet = file_of(tmp_path, tree), tmp_path / "batch.png"
    assert main(["data", "show", path, "--step", "2", "--out", str(sheet)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].endswith("samples in 4 packs")
    assert sum("tokens  " in line for line in lines) == int(lines[0].split()[2])
    for number in range(4):
        head = next(i for i, line in enumerate(lines) if line.startswith(f"pack {number}:"))
        used = int(lines[head].split()[2].replace(",", ""))
        body = lines[head + 1 :]
        body = body[: body.index("")] if "" in body else body
        assert used == sum(int(line.split()[0].replace(",", "")) for line in body if " tokens  " in line) <= 60
    with Image.open(sheet) as picture_of:
        assert picture_of.size[1] > 4 * 128
        assert len(set(picture_of.convert("L").tobytes())) > 50
    assert main(["data", "show", path, "--step", "0"]) == 2
    assert "the first step is 1, not 0" in capsys.readouterr().err


@pytest.mark.slow
def test_show_is_what_a_run_trains_on(tmp_path, tree, capsys):
    """The samples of step 3 from the beginning and from a checkpoint, and their number in the run's metrics."""
    path = file_of(tmp_path, tree)
    assert main(["data", "show", path, "--step", "3"]) == 0
    fresh = capsys.readouterr().out
    train_on(1, tree | {"train": tree["train"] | {"steps": 2}})
    capsys.readouterr()
    assert main(["data", "show", path, "--step", "3"]) == 0
    assert capsys.readouterr().out == fresh
    train_on(1, tree | {"train": tree["train"] | {"steps": 3}})
    assert int(fresh.split()[2]) == metrics_of(tmp_path / "run")[2]["samples"]
