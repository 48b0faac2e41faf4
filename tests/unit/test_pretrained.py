"""Weights on disk: our inference folder, the public folder, and what is refused in either."""

import argparse
import functools
import json
import pickle
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.inert import load_inert
from lumina.model.pretrained import load_safetensors

FILE = Path(__file__).parents[1] / "fixtures" / "flag_dit_tiny.safetensors"
OUTPUT_TOLERANCE = 2e-5
TINY = FlagDiTConfig(dim=16, n_layers=2, n_heads=2, multiple_of=16, in_channels=1, cap_feat_dim=8)


def random_model(config=TINY, seed=0) -> FlagDiT:
    torch.manual_seed(seed)
    model = FlagDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def assert_same_model(loaded, model):
    assert loaded.config == model.config
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == value.dtype and torch.equal(ours[key], value) for key, value in theirs.items())


# Our folder.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1, "learn_sigma": False, "norm_eps": 3e-4, "ffn_dim_multiplier": 1.3},
        {"qk_norm": False, "frames": True},
        {"cap_feat_dim": None, "num_classes": 5},
    ],
)
def test_round_trip(tmp_path, changes):
    model = random_model(replace(TINY, **changes))
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert_same_model(FlagDiT.from_pretrained(tmp_path / "new" / "folder"), model)


def test_bf16_stays_bf16(tmp_path):
    model = random_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert_same_model(FlagDiT.from_pretrained(tmp_path), model)


def test_what_is_trained_is_remembered(tmp_path):
    random_model().save_pretrained(tmp_path)
    frozen = [name for name, p in FlagDiT.from_pretrained(tmp_path).named_parameters() if not p.requires_grad]
    assert frozen == ["pad_token"]


@pytest.fixture
def small_shards(monkeypatch):
    split = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=8000)
    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", split)


@pytest.mark.usefixtures("small_shards")
def test_round_trip_in_several_files(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_model(FlagDiT.from_pretrained(tmp_path), model)


def test_a_folder_saved_over_holds_the_last_model(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        split = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=8000)
        patch.setattr("huggingface_hub.save_torch_state_dict", split)
        random_model().save_pretrained(tmp_path)
    second = random_model(seed=1)
    second.save_pretrained(tmp_path)
    assert_same_model(FlagDiT.from_pretrained(tmp_path), second)


@pytest.mark.usefixtures("small_shards")
def test_a_missing_shard_is_named(tmp_path):
    random_model().save_pretrained(tmp_path)
    second = sorted(tmp_path.glob("model-*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"lacks {second.name}"):
        FlagDiT.from_pretrained(tmp_path)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, text):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        FlagDiT.from_pretrained(tmp_path)


def test_no_weights_file(tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"config.json but no model\*.safetensors"):
        FlagDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no header", bytes(200), None], ids=["empty", "text", "zeros", "cut"])
def test_damaged_safetensors_are_named(tmp_path, content):
    random_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read as safetensors"):
        FlagDiT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"none.safetensors: cannot be read"):
        load_safetensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "config.json: not valid JSON"),
        (b"\xff\xfe{}", "config.json: not valid JSON"),
        (b"[]", "config.json: has no section `model`"),
        (b"{}", "config.json: has no section `model`"),
        (b'{"model": 3}', "config.json: has no section `model`"),
        (b'{"model": {"dim": 16, "layers": 2}}', r"unknown key model.layers; did you mean model.n_layers\?"),
        (b'{"model": {"n_layers": 0}}', "model.n_layers must be at least 1, not 0"),
        (None, "holds neither config.json nor consolidated"),
    ],
)
def test_damaged_config(tmp_path, content, words):
    random_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        FlagDiT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_such_weights(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder"):
        FlagDiT.from_pretrained(tmp_path / "none")
    random_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights is 'last'; it is `ema` or `model`"):
        FlagDiT.from_pretrained(tmp_path, weights="last")


def test_another_config_beside_the_folders_own_is_refused(tmp_path):
    random_model().save_pretrained(tmp_path)
    assert FlagDiT.from_pretrained(tmp_path, TINY).config == TINY
    with pytest.raises(ValueError, match="other sizes than the config passed"):
        FlagDiT.from_pretrained(tmp_path, replace(TINY, norm_eps=1e-6))


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_keys_that_do_not_fit_are_listed(tmp_path):
    random_model().save_pretrained(tmp_path)

    def spoil(state):
        del state["layers.1.attention.gate"]
        state["layers.2.attention.gate"] = torch.zeros(2)
        state["eol_token"] = torch.zeros(17)

    rewrite(tmp_path / "model.safetensors", spoil)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        FlagDiT.from_pretrained(tmp_path)
    for words in (
        "missing layers.1.attention.gate",
        "unexpected layers.2.attention.gate",
        "eol_token is (17,) instead of (16,)",
        str(tmp_path),
    ):
        assert words in str(caught.value)


def test_a_long_list_is_cut_and_counted(tmp_path):
    random_model().save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda state: [state.pop(key) for key in list(state)[:20]])
    with pytest.raises(ValueError, match="and 12 more") as caught:
        FlagDiT.from_pretrained(tmp_path)
    assert str(caught.value).count("missing") == 8


# The public folder.


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(FILE)


@pytest.fixture
def public_state(vectors):
    return {key.removeprefix("weights/"): v.clone() for key, v in vectors.items() if key.startswith("weights/")}


def public_config() -> FlagDiTConfig:
    with safe_open(FILE, framework="pt") as file:
        return FlagDiTConfig.from_dict(json.loads(file.metadata()["config"]))


def write_public(folder, state, name="consolidated.00-of-01", suffix="pth", arguments=None):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    settings = {"model": "DiT_Llama_Tiny_patch2", "qk_norm": True, "norm_eps": 1e-5, "lr": 1e-4, "cache_data": None}
    torch.save(argparse.Namespace(**settings | (arguments or {})), folder / "model_args.pth")
    return folder


def assert_reference_outputs(model, vectors):
    out = model(vectors["in/batch"], vectors["in/t"], vectors["in/cap_feats"], vectors["in/cap_mask"])
    torch.testing.assert_close(out, vectors["out/batch"], atol=OUTPUT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["consolidated", "consolidated_ema"])
def test_public_folder_gives_the_reference_outputs(tmp_path, vectors, public_state, name, suffix):
    folder = write_public(tmp_path / "public", public_state, f"{name}.00-of-01", suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = FlagDiT.from_pretrained(folder)
    expected = public_config()
    # How the width came to be rounded is not in the tensors, the width is.
    assert model.config.ffn_dim == expected.ffn_dim
    assert replace(model.config, multiple_of=32, ffn_dim_multiplier=None) == expected
    assert_reference_outputs(model, vectors)


def test_public_folder_without_model_args(tmp_path, vectors, public_state):
    folder = write_public(tmp_path / "public", public_state)
    (folder / "model_args.pth").unlink()
    assert_reference_outputs(FlagDiT.from_pretrained(folder), vectors)


def test_model_args_as_a_dict_and_its_norm_eps(tmp_path, public_state):
    folder = write_public(tmp_path / "public", public_state)
    torch.save({"norm_eps": 3e-3}, folder / "model_args.pth")
    assert FlagDiT.from_pretrained(folder).config.norm_eps == 3e-3


def test_averaged_weights_are_preferred(tmp_path, public_state):
    folder = write_public(tmp_path / "public", public_state)
    averaged = {key: value + 1 for key, value in public_state.items()}
    write_public(folder, averaged, "consolidated_ema.00-of-01")
    gates = {weights: FlagDiT.from_pretrained(folder, weights=weights) for weights in ("ema", "model")}
    assert torch.equal(gates["ema"].eol_token, averaged["eol_token"])
    assert torch.equal(gates["model"].eol_token, public_state["eol_token"])
    assert torch.equal(FlagDiT.from_pretrained(folder).eol_token, averaged["eol_token"])
    (folder / "consolidated.00-of-01.pth").unlink()
    with pytest.raises(ValueError, match=r"no consolidated.NN-of-MM"):
        FlagDiT.from_pretrained(folder, weights="model")


COLUMN = re.compile(
    r"\.(wq|wk|wv|wk_y|wv_y|w1|w3)\.weight$|^x_embedder\.|^cap_embedder\.1\.|^t_embedder\.mlp\.0\.|adaLN_modulation"
    r"|^final_layer\.linear|(q_norm|k_norm|ky_norm)\.|\.gate$"
)
ROW = re.compile(r"\.(wo|w2)\.weight$|^t_embedder\.mlp\.2\.weight$")


def split_over(state, parts):
    """As the public trainer cuts parameters over model-parallel ranks; the rest is the same in each."""
    files = [{} for _ in range(parts)]
    for key, value in state.items():
        dim = 0 if COLUMN.search(key) else 1 if ROW.search(key) else None
        pieces = [value] * parts if dim is None else value.chunk(parts, dim)
        for file, piece in zip(files, pieces, strict=True):
            file[key] = piece.clone()
    return files


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_model_parallel_files_are_merged_and_warned_of(tmp_path, public_state, parts, suffix):
    folder = tmp_path / "public"
    for i, piece in enumerate(split_over(public_state, parts)):
        write_public(folder, piece, f"consolidated.{i:02d}-of-{parts:02d}", suffix)
    with pytest.warns(UserWarning, match=f"{parts} model-parallel ranks, with norms over each rank's own heads"):
        state = FlagDiT.from_pretrained(folder).state_dict()
    assert state.keys() == public_state.keys()
    assert all(torch.equal(state[key], value) for key, value in public_state.items())


@pytest.mark.parametrize(("kept", "lacking"), [([0, 2], "01-of-04, 03-of-04"), ([1, 2, 3], "00-of-04")])
def test_a_missing_part_is_named(tmp_path, public_state, kept, lacking):
    folder = tmp_path / "public"
    files = split_over(public_state, 4)
    for i in kept:
        write_public(folder, files[i], f"consolidated.{i:02d}-of-04")
    with pytest.raises(ValueError, match=f"of 4 model-parallel files it lacks {lacking}$"):
        FlagDiT.from_pretrained(folder)


def test_parts_with_other_keys_are_refused(tmp_path, public_state):
    first, second = split_over(public_state, 2)
    del second["eol_token"]
    write_public(tmp_path / "public", first, "consolidated.00-of-02")
    write_public(tmp_path / "public", second, "consolidated.01-of-02")
    with (
        pytest.warns(UserWarning, match="model-parallel"),
        pytest.raises(ValueError, match="do not hold the same keys"),
    ):
        FlagDiT.from_pretrained(tmp_path / "public")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("module", ["os", "sys", "builtins", "tests.elsewhere"])
def test_a_refused_pickle_is_told_by_what_it_names(tmp_path, module):
    """Torch words it otherwise for modules that it blocks, and then advises to load the file without protection."""
    file, named = tmp_path / "model_args.pth", "system" if module == "builtins" else f"{module}.system"
    _with_pickle(file, f"\x80\x02c{module}\nsystem\n(S'true'\ntR.".encode("latin-1"))
    with pytest.raises(ValueError, match="refused, it is damaged") as caught:
        load_inert(file)
    assert f"(it names {named})" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_getattr_of_a_pickle_gets_nothing(tmp_path):
    """Some versions of Python write members of enumerations so; of what else has attributes, nothing is had."""
    file = tmp_path / "a.pth"
    code = (
        b"\x80\x02c__builtin__\ngetattr\n(cdeepspeed.utils.tensor_fragment\nfragment_address\nX\x09\0\0\0__class__tR."
    )
    _with_pickle(file, code)
    assert load_inert(file).arguments == ("__class__",)
    _with_pickle(file, b"\x80\x02c__builtin__\ngetattr\n(cos\npath\nX\x03\0\0\0septR.")
    with pytest.raises(ValueError, match=r"it names os\.path"):
        load_inert(file)


def _with_pickle(file: Path, code: bytes) -> None:
    """A file of `torch.save` with another pickle in it."""
    torch.save({"a": torch.zeros(1)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, code if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("where", ["consolidated.00-of-01.pth", "consolidated_ema.00-of-01.pth", "model_args.pth"])
@pytest.mark.parametrize("how", ["torch.save", "pickle.dump"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, public_state, where, how):
    trace = tmp_path / "ran"
    folder = write_public(tmp_path / "public", public_state)
    contents = {"eol_token": torch.zeros(3), "more": Payload(trace)}
    if how == "torch.save":
        torch.save(contents, folder / where)
    else:
        (folder / where).write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(ValueError, match=f"{where}: refused, it is damaged or holds more than weights and settings"):
        FlagDiT.from_pretrained(folder)
    assert not trace.exists()
    # The payload is a live one.
    pickle.loads(pickle.dumps(Payload(trace)))  # noqa: S301
    assert trace.exists()


@pytest.mark.parametrize(
    ("where", "contents"),
    [
        ("consolidated.00-of-01.pth", [1, 2]),
        ("consolidated.00-of-01.pth", "text"),
        ("consolidated.00-of-01.pth", {"eol_token": 3}),
        ("model_args.pth", [1, 2]),
        ("model_args.pth", "text"),
    ],
)
def test_pth_files_of_something_else_are_named(tmp_path, public_state, where, contents):
    folder = write_public(tmp_path / "public", public_state)
    torch.save(contents, folder / where)
    with pytest.raises(ValueError, match=where):
        FlagDiT.from_pretrained(folder)


def test_a_cut_pth_is_named(tmp_path, public_state):
    folder = write_public(tmp_path / "public", public_state)
    path = folder / "consolidated.00-of-01.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"consolidated.00-of-01.pth: refused, it is damaged") as caught:
        FlagDiT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_public_keys_that_do_not_fit_are_listed(tmp_path, public_state):
    public_state["layers.1.attention.extra"] = public_state.pop("layers.1.attention.gate")
    folder = write_public(tmp_path / "public", public_state)
    with pytest.raises(ValueError, match="does not fit") as caught:
        FlagDiT.from_pretrained(folder)
    assert "missing layers.1.attention.gate" in str(caught.value)
    assert "unexpected layers.1.attention.extra" in str(caught.value)


def test_weights_of_something_else(tmp_path):
    folder = write_public(tmp_path / "public", {"conv.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"no tensor x_embedder.weight; these are not the weights of a Flag-DiT"):
        FlagDiT.from_pretrained(folder)


@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_sizes_are_read_from_the_tensors(tmp_path, n_kv_heads):
    config = FlagDiTConfig(
        dim=48,
        n_layers=3,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        multiple_of=16,
        ffn_dim_multiplier=1.7,
        cap_feat_dim=12,
        learn_sigma=False,
        qk_norm=False,
    )
    model = random_model(config)
    folder = write_public(tmp_path / "public", model.state_dict())
    found = FlagDiT.from_pretrained(folder).config
    assert found.ffn_dim == config.ffn_dim
    assert replace(found, multiple_of=16, ffn_dim_multiplier=1.7) == config


def test_label_conditional_public_folder(tmp_path):
    config = FlagDiTConfig(dim=48, n_layers=1, n_heads=4, multiple_of=16, num_classes=7)
    model = random_model(config)
    folder = write_public(tmp_path / "public", model.state_dict(), arguments={"n_heads": 4})
    loaded = FlagDiT.from_pretrained(folder)
    assert (loaded.config.num_classes, loaded.config.n_heads) == (7, 4)
    x, t, labels = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([3, 7])
    assert torch.equal(loaded(x, t, labels=labels), model(x, t, labels=labels))
    # The tensors do not tell the heads.
    (folder / "model_args.pth").unlink()
    with pytest.raises(ValueError, match=r"how many heads .* pass config"):
        FlagDiT.from_pretrained(folder)
    assert_same_model(FlagDiT.from_pretrained(folder, config), model)


def test_frames_on_a_public_file_are_initialised_with_a_warning(tmp_path, public_state):
    folder = write_public(tmp_path / "public", public_state)
    config = replace(public_config(), frames=True)
    with pytest.warns(UserWarning, match="no nextframe_token: it is initialised, and needs training"):
        model = FlagDiT.from_pretrained(folder, config)
    assert model.nextframe_token.std().item() == pytest.approx(0.02, rel=0.4)
    assert torch.equal(model.eol_token, public_state["eol_token"])
    with pytest.warns(UserWarning, match="nextframe_token"):
        again = FlagDiT.from_pretrained(folder, config)
    assert torch.equal(again.nextframe_token, model.nextframe_token)
