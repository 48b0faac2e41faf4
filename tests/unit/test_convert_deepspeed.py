"""DeepSpeed's folders: put together by parameter as DeepSpeed itself does, and refused where something is amiss."""

import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lumina.checkpoint.deepspeed_layout import cut_groups, cut_parameters
from lumina.checkpoint.load import latest_checkpoint
from lumina.checkpoint.sources import open_source
from lumina.config.schema import TrainConfig
from lumina.model.flag_dit import FlagDiT
from lumina.train.initial import Start
from tests.unit.converting import assert_equal, random_state, tensors_of, to, write_config
from tests.unit.deepspeed_runs import DTYPES, SIZES, STAGES, STEPS, WORLDS, write_all

MOMENTS = ("exp_avg", "exp_avg_sq")

# What DeepSpeed wrote.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    write_all(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_masters_and_moments_are_those_of_the_engine(tmp_path, folders, stage, dtype, world):
    folder = folders / f"{stage}_{dtype}_{world}"
    expected = torch.load(folder / "expected.pt", weights_only=True)
    done = to(folder, tmp_path / "run", "training")
    found = tensors_of(tmp_path / "run")
    manifest = latest_checkpoint(tmp_path / "run").manifest
    frozen = found["master"].pop("pad_token")
    assert_equal(found["master"], expected["master"])
    for kind in MOMENTS:
        assert_equal(found[kind], expected[kind])
    # What is not trained has no master: it stays in the dtype of the working weights.
    torch.manual_seed(0)
    model = FlagDiT(SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    working = model.pad_token.bfloat16().float() if dtype == "bf16" else model.pad_token
    assert torch.equal(frozen, working)
    assert_equal(found["ema"], expected["master"] | {"pad_token": frozen})
    assert manifest.step == STEPS
    # Without ZeRO, DeepSpeed's bf16 optimizer takes a step of zeros before the first: Adam has counted it.
    assert manifest.optimizer_steps == STEPS + (stage == 0 and dtype == "bf16")
    assert done.moments == 2 * len(expected["exp_avg"])
    assert all(proof.exact for proof in done.proofs)


# DeepSpeed's script does not read what its BF16_Optimizer writes, which is that of ZeRO 1 in bf16.
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_masters_are_those_of_zero_to_fp32(folders, stage, dtype):
    folder = folders / f"{stage}_{dtype}_2"
    theirs = torch.load(folder / "expected.pt", weights_only=True)["zero_to_fp32"]
    source = open_source(folder / f"global_step{STEPS}")  # the tag's folder
    ours = {name: source.read("master", name).float() for name in source.tensors["master"]}
    missing = ours.keys() - theirs.keys()
    assert missing == (set() if stage > 1 else {"pad_token"})
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name].float())] == []


class _ByName:
    """Pickled as a member of DeepSpeed's enumeration is by Python 3.11.0 to 3.11.3."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self):
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, self.name)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "member"), [(1, "optimizer_states"), (2, "gradients"), (3, "weights")])
def test_stages_that_are_pickled_by_name(tmp_path, folders, stage, member):
    shutil.copytree(folders / f"{stage}_fp32_2", tmp_path / "folder")
    for file in (tmp_path / "folder").rglob("*optim_states.pt"):
        state = torch.load(file, weights_only=False)
        state["optimizer_state_dict"]["zero_stage"] = _ByName(member)
        torch.save(state, file)
    source = open_source(tmp_path / "folder")
    assert source.training["zero_stage"] == stage
    assert_equal(
        {name: source.read("master", name) for name in source.tensors["master"] if name != "pad_token"},
        torch.load(folders / f"{stage}_fp32_2" / "expected.pt", weights_only=True)["master"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2_fp32_2", "3_bf16_2"])
def test_training_starts_from_it(folders, name):
    model = FlagDiT(SIZES)
    start = Start(TrainConfig(steps=1, init_from=str(folders / name)), model)
    expected = torch.load(folders / name / "expected.pt", weights_only=True)["master"]
    state = model.state_dict()
    state.pop("pad_token")
    assert_equal(state, expected)
    assert start.said == [f"starting from the master weights of {folders / name}, step {STEPS}"]


@pytest.mark.slow
def test_to_an_inference_folder(tmp_path, folders):
    folder = folders / "3_bf16_2"
    text = {"encoder": "bytes", "width": 8, "max_tokens": 8}
    with pytest.raises(ValueError, match=r"--config CONFIG"):
        to(folder, tmp_path / "out", "inference")
    wrong = write_config(tmp_path / "wrong.yaml", text=text)
    with pytest.raises(ValueError, match=r"the model of the configuration: x_embedder.weight is \(12, 4\) instead"):
        to(folder, tmp_path / "out", "inference", config=wrong)
    right = write_config(tmp_path / "right.yaml", text=text, model=SIZES.to_dict())
    to(folder, tmp_path / "out", "inference", config=right, dtype="fp32")
    expected = torch.load(folder / "expected.pt", weights_only=True)["master"]
    state = FlagDiT.from_pretrained(tmp_path / "out").state_dict()
    state.pop("pad_token")
    assert_equal(state, expected)


# Where the flattened values lie.

SHAPES = [{"a": (3, 5), "b": (7,), "c": ()}, {"d": (2, 2), "e": (9,)}]


def values_of(shapes):
    torch.manual_seed(1)
    return {name: torch.randn(shape) for group in shapes for name, shape in group.items()}


def gathered(cut, flats):
    """Each parameter put together from `flats` by rank and group."""
    return {
        name: torch.cat([flats[p.rank][p.group][p.start : p.start + p.numel] for p in pieces]).view(shape)
        for name, shape, pieces in cut
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("trimmed", [False, True])
def test_groups_are_flattened_and_cut(world, align, trimmed):
    """`trimmed`: the last rank's masters are saved without the padding."""
    values = values_of(SHAPES)
    paddings = [[-v % align for v in (15, 7, 1)], [-v % align for v in (4, 9)]]
    flats = [[] for _ in range(world)]
    for group, behind in zip(SHAPES, paddings, strict=True):
        row = torch.cat(
            [torch.cat((values[n].view(-1), torch.full((pad,), 99.0))) for n, pad in zip(group, behind, strict=True)]
        )
        padding = -len(row) % (2 * world)
        for flat, part in zip(flats, torch.cat((row, torch.full((padding,), 99.0))).chunk(world), strict=True):
            flat.append(part)
        if trimmed and padding:
            flats[-1][-1] = flats[-1][-1][:-padding]
    sizes = [[len(flat) for flat in of_rank] for of_rank in flats]
    assert_equal(gathered(cut_groups(SHAPES, sizes, paddings), flats), values)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parameters_are_cut_and_laid_in_a_row(world):
    values = values_of(SHAPES)
    flats = [[] for _ in range(world)]
    for group in SHAPES:
        shares = [
            torch.cat((v.view(-1), torch.full((-v.numel() % world,), 99.0))).chunk(world)
            for v in (values[n] for n in group)
        ]
        for rank in range(world):
            flats[rank].append(torch.cat([share[rank] for share in shares]))
    sizes = [[len(flat) for flat in of_rank] for of_rank in flats]
    assert_equal(gathered(cut_parameters(SHAPES, sizes), flats), values)
    # A rank's flat tensors are one row, wherever it is cut.
    rows = [torch.cat(of_rank) for of_rank in flats]
    recut = [[row[:4], row[4:5], row[5:]] for row in rows]
    sizes = [[len(flat) for flat in of_rank] for of_rank in recut]
    assert_equal(gathered(cut_parameters(SHAPES, sizes), recut), values)


@pytest.mark.parametrize(
    ("cut", "sizes", "words"),
    [
        (lambda s: cut_groups(SHAPES, s, [[0] * 3, [0] * 2]), [[23, 12]], "e reaches beyond the 12 values"),
        (lambda s: cut_groups(SHAPES, s, [[0] * 3, [0] * 2]), [[23, 99]], "86 of the 99 values .* are nobody's"),
        (lambda s: cut_groups(SHAPES, s, [[0] * 3, [0] * 2]), [[23]], "do not agree on the parameter groups"),
        (lambda s: cut_groups(SHAPES, s, [[0] * 3]), [[23, 13]], "do not agree on the parameter groups"),
        (lambda s: cut_parameters(SHAPES, s), [[23, 12]], "e reaches beyond the 35 values"),
        (lambda s: cut_parameters(SHAPES, s), [[23, 14]], "1 of the 37 values"),
        (lambda s: cut_parameters(SHAPES, s), [[20], [21]], "flat tensors of different sizes"),
    ],
)
def test_sizes_that_do_not_add_up(cut, sizes, words):
    with pytest.raises(ValueError, match=words):
        cut(sizes)


# Folders made by hand, with what DeepSpeed writes into them.


def write_folder(folder, state, *, wrap="", moments=True, **changes):
    """ZeRO 2 on two ranks, one group; `wrap` stands before each name; returns the tag's folder."""
    tag = folder / "global_step9"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step9\n")
    trained = {name: value for name, value in state.items() if name != "pad_token"}
    model = {
        "module": {wrap + name: value.bfloat16() for name, value in state.items()},
        "buffer_names": [],
        "param_shapes": [{wrap + name: value.shape for name, value in trained.items()}],
        "dp_world_size": 2,
        "global_steps": 9,
        "ds_version": "0.19.8",
    }
    torch.save(model | changes, tag / "mp_rank_00_model_states.pt")
    rows = {kind: torch.cat([v.view(-1) for v in trained.values()]) * factor for kind, factor in FACTORS.items()}
    for rank in range(2):
        halves = {kind: row.chunk(2)[rank].clone() for kind, row in rows.items()}
        adam = {"step": torch.tensor(8.0)} | {kind: halves[kind] for kind in MOMENTS}
        optimizer = {
            "zero_stage": 2,
            "single_partition_of_fp32_groups": [halves["master"]],
            "base_optimizer_state": {"state": {0: adam} if moments else {}, "param_groups": [{"params": [0]}]},
        }
        torch.save({"optimizer_state_dict": optimizer}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


FACTORS = {"master": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}
STATE = random_state(SIZES, 0)
FROZEN = {"pad_token": STATE["pad_token"].bfloat16().float()}


@pytest.mark.parametrize("wrap", ["", "module.", "model._orig_mod."])
@pytest.mark.parametrize("at", ["", "global_step9"])
def test_what_stands_before_the_names_is_taken_off(tmp_path, wrap, at):
    write_folder(tmp_path / "saved", STATE, wrap=wrap)
    to(tmp_path / "saved" / at, tmp_path / "run", "training")
    found = tensors_of(tmp_path / "run")
    assert_equal(found["master"], STATE | FROZEN)
    for kind in MOMENTS:
        trained = {name: value * FACTORS[kind] for name, value in STATE.items() if name != "pad_token"}
        assert_equal(found[kind], trained)
    assert latest_checkpoint(tmp_path / "run").manifest.optimizer_steps == 8


def test_before_the_first_step_there_are_no_moments(tmp_path):
    write_folder(tmp_path / "saved", STATE, moments=False)
    to(tmp_path / "saved", tmp_path / "run", "training")
    assert sorted(tensors_of(tmp_path / "run")) == ["ema", "master"]
    assert latest_checkpoint(tmp_path / "run").manifest.optimizer_steps == 0


def test_groups_that_files_do_not_tell_apart(tmp_path):
    """ZeRO 0 writes moments by number: of two groups whose shapes are alike nothing says which is which."""
    model = FlagDiT(SIZES)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[::2]}, {"params": trained[1::2]}])
    sum(p.sum() for p in trained).backward()
    optimizer.step()
    tag = tmp_path / "tag"
    tag.mkdir()
    state = {"module": model.state_dict(), "buffer_names": [], "param_shapes": None, "global_steps": 1}
    torch.save(state | {"optimizer": optimizer.state_dict()}, tag / "mp_rank_00_model_states.pt")
    done = to(tag, tmp_path / "run", "training")
    assert any("does not say which of its 2 parameter groups holds which parameter" in note for note in done.notes)
    assert_equal(tensors_of(tmp_path / "run")["master"], {k: v.detach() for k, v in model.state_dict().items()})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tag: (tag / RANK_1).unlink(), "of 2 .*_optim_states.pt files, one a data-parallel rank, it has 1"),
        (lambda tag: (tag / RANK_0).unlink(), r"of the ranks \[1\] alone"),
        (lambda tag: (tag.parent / "latest").write_text("../tag"), r"latest names '../tag', which is no folder"),
        (lambda tag: (tag.parent / "latest").write_text("step8"), "latest names 'step8', which is no folder"),
        (lambda tag: (tag / MODEL).rename(tag / MODEL.replace("00", "01")), "of several model-parallel ranks"),
        (lambda tag: (tag / f"expert_0_{MODEL}").touch(), "is not of a plain DeepSpeed checkpoint"),
        (lambda tag: torch.save([1], tag / MODEL), "is no model state of DeepSpeed"),
        (lambda tag: torch.save([1], tag / RANK_1), "is no optimizer state of DeepSpeed"),
        (lambda tag: torch.save({"module": {}}, tag / MODEL), "no tensor x_embedder.weight"),
        (lambda tag: (tag / RANK_1).write_bytes(b"cut"), "refused, it is damaged"),
        (lambda tag: save_optimizer(tag, base_optimizer_state=[]), "an elastic one"),
        (lambda tag: save_optimizer(tag, base_optimizer_state={}), "not laid out as DeepSpeed's are"),
        (lambda tag: save_optimizer(tag, single_partition_of_fp32_groups=[None]), "has no master of every group"),
    ],
)
def test_what_is_amiss_is_named(tmp_path, spoil, words):
    tag = write_folder(tmp_path / "saved", STATE)
    spoil(tag)
    with pytest.raises(ValueError, match=words) as caught:
        to(tmp_path / "saved", tmp_path / "run", "training")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


MODEL = "mp_rank_00_model_states.pt"
RANK_0 = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
RANK_1 = RANK_0.replace("rank_0_", "rank_1_")


def save_optimizer(tag, **changes):
    """The first rank's file, with other contents."""
    state = torch.load(tag / RANK_0, weights_only=True)
    state["optimizer_state_dict"].update(changes)
    torch.save(state, tag / RANK_0)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", [MODEL, RANK_0, RANK_1])
@pytest.mark.parametrize("how", ["torch.save", "pickle.dump"])
def test_no_pickle_runs(tmp_path, where, how):
    tag, trace = write_folder(tmp_path / "saved", STATE), tmp_path / "ran"
    contents = torch.load(tag / where, weights_only=True) | {"more": Payload(trace)}
    if how == "torch.save":
        torch.save(contents, tag / where)
    else:
        (tag / where).write_bytes(pickle.dumps({"more": Payload(trace)}, protocol=2))
    with pytest.raises(ValueError, match=f"{where}: refused, it is damaged or holds more than weights and settings"):
        to(tmp_path / "saved", tmp_path / "run", "training")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))  # noqa: S301 - the payload is a live one
    assert trace.exists()


class LossScaler:
    """Under DeepSpeed's name, a class whose making leaves a trace."""

    def __init__(self, path):
        self.path = path
        Path(path).touch()

    def __reduce__(self):
        return LossScaler, (self.path,)


def test_a_class_of_deepspeeds_name_is_a_stand_in(tmp_path, monkeypatch):
    tag, trace = write_folder(tmp_path / "saved", STATE), tmp_path / "ran"
    state = torch.load(tag / RANK_0, weights_only=True)
    name = "deepspeed.runtime.fp16.loss_scaler"
    monkeypatch.setattr(LossScaler, "__module__", name)
    with monkeypatch.context() as patch:
        for end in (9, 17, 22, len(name)):  # each package of the name
            patch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
        sys.modules[name].LossScaler = LossScaler
        state["optimizer_state_dict"]["loss_scaler"] = LossScaler(str(trace))
        torch.save(state, tag / RANK_0)
        trace.unlink()
        to(tmp_path / "saved", tmp_path / "run", "training")
        assert not trace.exists()
        torch.load(tag / RANK_0, weights_only=False)
        assert trace.exists()  # the class is a live one
    assert_equal(tensors_of(tmp_path / "run")["master"], STATE | FROZEN)
