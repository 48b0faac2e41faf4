"""What cannot run is refused before a process group is made: the number that does not fit, the nearest that would."""

import itertools

import pytest

from lumina.config.load import validate
from lumina.model.config import FlagDiTConfig
from lumina.parallel.cuts import cut
from lumina.parallel.layout import check_layout

SIZES = {"dim": 48, "n_layers": 4, "n_heads": 12, "n_kv_heads": 6, "multiple_of": 8, "cap_feat_dim": 16}


def check(world=1, precision="fp32", packs=24, at_once=1, **parallel):
    sizes = FlagDiTConfig(**SIZES)
    tree = {
        "run": {"dir": "unused"},
        "model": {},
        "data": {"shards": ["unused"]},
        "train": {"steps": 1, "global_batch_packs": packs, "packs_per_forward": at_once},
        "precision": precision,
        "parallel": parallel,
    }
    check_layout(validate(tree, "test"), sizes, world)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"tensor": 4, "world": 4},
            r"parallel.tensor=4 does not divide model.n_kv_heads=6; the nearest that does is 2",
        ),
        ({"tensor": 5, "world": 5}, r"parallel.tensor=5 does not divide model.n_heads=12; the nearest that does is 1"),
        (
            {"tensor": 3, "world": 6},
            r"parallel.tensor=3 does not divide the feed-forward width 128; the nearest that does is 2",
        ),
        ({"sequence": True}, r"parallel.sequence .* with parallel.tensor=1 set it to false"),
        ({"pipeline": 5, "world": 5}, r"parallel.pipeline=5 stages are more than the 4 blocks .* at most 4"),
        (
            {"ulysses": 4, "tensor": 2, "world": 8},
            r"parallel.ulysses=4 ranks cannot share 3 key-value heads \(model.n_kv_heads=6 over parallel.tensor=2\); "
            r"with as many ranks, set parallel.ulysses=2 and parallel.ring=2",
        ),
        (
            {"ulysses": 8, "ring": 3, "world": 24},
            r"parallel.ulysses=8 ranks cannot share 6 key-value heads .* set parallel.ulysses=6 and parallel.ring=4",
        ),
        ({"world": 4, "packs": 7, "at_once": 2}, r"train.global_batch_packs=7 .* the nearest number that can is 8"),
        (
            {"pipeline": 2, "zero_stage": 2, "world": 2},
            r"parallel.zero_stage=2 does not go with parallel.pipeline=2: .* set parallel.zero_stage to 0 or 1",
        ),
        (
            {"pipeline": 2, "zero_stage": 2, "world": 2, "precision": "bf16"},
            r"parallel.zero_stage=2 does not go with parallel.pipeline=2: .* set parallel.zero_stage to 1$",
        ),
        ({"pipeline": 2, "zero_stage": 3, "world": 2}, r"parallel.zero_stage=3 does not go with parallel.pipeline=2"),
        ({"zero_stage": 0, "precision": "bf16"}, r"precision=bf16 needs parallel.zero_stage 1, 2 or 3"),
        ({"zero_stage": 0, "offload_optimizer": True}, r"parallel.offload_optimizer=true needs parallel.zero_stage 1"),
        ({"offload_activations": True}, r"parallel.recompute=none keeps more .* set parallel.recompute=full"),
        (
            {"offload_activations": True, "recompute": "selective"},
            r"parallel.recompute=selective keeps more .* set parallel.recompute=full",
        ),
        (
            {"tensor": 2, "ring": 3, "world": 8},
            r"a world of 8 processes cannot be laid out as parallel.tensor=2 × parallel.ring=3, which takes a multiple "
            r"of 6; the nearest is 6",
        ),
        ({"ring": 16, "world": 1}, r"a world of 1 processes .* parallel.ring=16, .* the nearest is 16"),
        ({"world": 4, "packs": 6}, r"train.global_batch_packs=6 cannot be shared by 4 data-parallel ranks; .* is 4"),
        ({"world": 4, "ring": 2, "packs": 3}, r"train.global_batch_packs=3 cannot be shared by 2 .* is 2"),
        (
            {"packs": 6, "at_once": 4},
            r"train.packs_per_forward=4 does not divide the 6 packs that each rank has in a step; the nearest .* is 3",
        ),
    ],
)
def test_sentences(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        check(**settings)
    assert "\n" not in str(error.value)


def test_what_can_run_is_let_pass():
    check(world=8, tensor=2, pipeline=2, ring=2, sequence=True, zero_stage=1)
    check(
        world=12,
        tensor=2,
        ulysses=3,
        ring=2,
        sequence=False,
        zero_stage=3,
        offload_optimizer=True,
        recompute="selective",
    )
    check(world=8, pipeline=4, precision="bf16", recompute="full", offload_activations=True)
    check(world=5, ring=5)  # a ring of any size
    check(world=5, ulysses=5)  # heads that do not divide


def test_a_refused_layout_starts_nothing(tmp_path, monkeypatch):
    """Not a process group, not a file."""
    from lumina.config.load import load_config
    from lumina.train import loop

    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path}/run}}\nmodel: {{dim: 16, n_layers: 2, n_heads: 2, num_classes: 3}}\n"
        "data: {shards: [nowhere]}\ntrain: {steps: 1}\nprecision: fp32\nparallel: {tensor: 4}\n"
    )
    monkeypatch.setattr(loop, "open_mesh", lambda *_: pytest.fail("process groups were made"))
    with pytest.raises(ValueError, match=r"parallel.tensor=4 does not divide model.n_heads=2; the nearest .* is 1"):
        loop.train(load_config(config))
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(("blocks", "stages"), [(1, 1), (4, 4), (7, 3), (9, 2), (10, 4)])
def test_blocks_are_cut_so_that_the_dearest_stage_is_cheapest(blocks, stages):
    costs = [float(1 + (7 * i) % 5) for i in range(blocks)]
    found = cut(costs, stages)
    assert [i for stretch in found for i in stretch] == list(range(blocks))
    assert len(found) == stages
    assert all(len(stretch) for stretch in found)
    best = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *inner, blocks)))
        for inner in itertools.combinations(range(1, blocks), stages - 1)
    )
    assert max(sum(costs[i] for i in stretch) for stretch in found) == best
