"""`lumina plan --fit`: the longest sample, the largest model and the fewest devices, against trying them all."""

import dataclasses
import re

import pytest
import yaml

from lumina.benchmark.plan_work import work_of
from lumina.cli import main
from lumina.model.config import FlagDiTConfig
from lumina.planner.fit import (
    fewest_devices,
    fits,
    largest_model,
    longest_sample,
    on_devices,
    shapes,
    with_tokens,
    world_sizes,
)
from lumina.planner.search import smallest, usable
from tests.unit.plans import SMALL, asked, planned

RINGS = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.ulysses=1")  # with data parallel: few layouts


@pytest.mark.slow
def test_the_longest_sample_fits_and_a_longer_does_not():
    work = planned(fit="tokens", tokens=None, packs=None, memory=4.0, gpus=4)
    tokens, (parallel, memory) = longest_sample(work)
    assert memory.on_device <= work.memory < usable(5 * 2**30)
    assert tokens % 1024 == 0
    assert fits(with_tokens(work, tokens))[1].on_device == memory.on_device
    assert fits(with_tokens(work, tokens + 1024)) is None
    assert parallel.ring * parallel.ulysses * parallel.tensor == 4
    assert work.packs == 4  # one for each device


def test_samples_too_short_for_the_ranks_hide_no_longer_one():
    """2,048 ranks of a ring: with 1,024 tokens half of them would have none."""
    work = planned(*RINGS, "parallel.ring=2048", fit="tokens", tokens=None, packs=1, gpus=2048)
    assert fits(with_tokens(work, 1024)) is None
    assert longest_sample(work)[0] > 2048


@pytest.mark.slow
def test_no_fewer_devices_fit():
    """Among all counts: 88 devices are 11 hosts, and half as many of a power of two do not do."""
    for tokens, expected in ((5 * 2**19, 88), (2**22, 136), (2**17, 5)):
        work = planned(*RINGS, fit="devices", packs=None, gpus=None, tokens=tokens, memory=3.0)
        tried = {world: fits(on_devices(work, world, a_pack_each=True)) for world in world_sizes(8)[:25]}
        world, (parallel, memory) = fewest_devices(work, a_pack_each=True)
        assert world == next(count for count, found in tried.items() if found) == expected
        assert (parallel, memory) == tried[world]
    assert world_sizes(8)[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]
    assert [world for world in world_sizes(8) if world > 1000] == [1008, 1016, 1024, *range(1152, 16_385, 128)]


def test_packs_that_are_given_have_to_be_shared():
    """4 devices have room for their share of the states, but 6 packs are shared by 3 or 6."""
    alone = (*RINGS, "parallel.ring=1", "parallel.zero_stage=3", "parallel.offload_optimizer=false")
    work = planned(*alone, fit="devices", packs=6, gpus=None)
    three, four = (smallest(on_devices(work, world, a_pack_each=True))[1].on_device for world in (3, 4))
    assert four < three
    tight = dataclasses.replace(work, memory=(three + four) / 2)
    assert fewest_devices(tight)[0] == 6
    assert fewest_devices(tight, a_pack_each=True)[0] == 4


def of_models(*overrides, **options):
    given = {"fit": "model", "model": None, "packs": None, "gpus": 4, "host_memory": 8.0}
    return work_of(asked(*overrides, **given | options))[0]


@pytest.mark.slow
def test_the_largest_model_is_the_largest_of_all():
    """With 12, 14 and 16 heads there are layouts that fit, with 13 and 15 none that do."""
    work = of_models(memory=4.58)
    sizes, (_, memory) = largest_model(work)
    assert memory.on_device <= work.memory
    models = {model.n_heads: model for model in shapes(work.sizes)}
    fitting = [heads for heads in range(12, 25) if fits(dataclasses.replace(work, sizes=models[heads])) is not None]
    assert fitting == [12, 14, 16]
    assert (sizes.dim, sizes.n_layers, sizes.n_heads) == (16 * 128, 16, 16)


def test_layouts_of_some_models_only():
    """Three tensor-parallel ranks share 9 heads, but not 1 or 2 of them."""
    work = of_models("parallel.tensor=3", memory=3.0, gpus=6)
    assert largest_model(work)[0].n_heads == 9


@pytest.mark.slow
def test_blocks_and_key_value_heads_are_held(capsys):
    work = of_models("model.n_kv_heads=4", memory=4.0)
    sizes, _ = largest_model(work)
    assert (sizes.n_kv_heads, sizes.n_heads % 4, sizes.n_layers) == (4, 0, sizes.n_heads)
    assert sizes.n_heads > 4
    words = ["--fit", "model", "--gpus", "4", "--memory", "4", "--host-memory", "8"]
    assert main(["plan", *words, "model.n_layers=3", "model.n_kv_heads=2"]) == 0
    said = capsys.readouterr().out
    assert "models of 3 blocks, heads of 128 and 2 of keys and values" in said
    width = int(re.search(r"3 blocks of width ([\d,]+)", said)[1].replace(",", ""))
    model = yaml.safe_load(said[said.index("    model:") :])["model"]
    assert width > 2 * 128
    assert FlagDiTConfig.from_dict(model) == FlagDiTConfig(
        dim=width, n_layers=3, n_heads=width // 128, n_kv_heads=2, cap_feat_dim=4096
    )


@pytest.mark.parametrize(
    ("words", "there", "not_there"),
    [
        (
            ["--fit", "tokens", "--gpus", "2", "--memory", "5", "--model", "600m"],
            ["a sample a pack, 2 packs a step\n2 × h100-80g; 2.8 GiB", "the longest sample: "],
            ["4,096", "1 × ", "host,", "on 1 host"],
        ),
        (
            ["--fit", "devices", "--model", "600m", "--tokens", "65536", "--memory", "5"],
            [
                "1 × 65,536 tokens a pack, as many packs a step as devices",
                "any number up to 8",
                "the fewest devices: 4,",
            ],
            ["8 packs", "8 × h100"],
        ),
        (
            ["--fit", "devices", "--model", "600m", "--tokens", "65536", "--memory", "5", "train.global_batch_packs=6"],
            ["6 packs a step", "global_batch_packs: 6"],
            ["as many packs"],
        ),
    ],
)
def test_what_is_said_is_so(words, there, not_there, capsys):
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in there)
    before = said.partition("\n\n|")[0]
    assert not any(part in before for part in not_there)
    assert "to run it:" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tokens", "--tokens", "4096"], "--fit tokens does not take --tokens: it finds"),
        (["tokens", "--samples", "1"], "--fit tokens does not take --samples"),
        (["tokens", "--nodes", "2"], "--fit tokens does not take --nodes: it asks what fits, and not how fast"),
        (["tokens", "--network", "x"], "--fit tokens does not take --network"),
        (["tokens", "--top", "3"], "--fit prints one answer"),
        (["tokens", "--json"], "--fit prints one answer"),
        (["devices", "--gpus", "8"], "--fit devices does not take --gpus: it finds them"),
        (["devices", "--nodes", "2"], "--fit devices does not take --nodes"),
        (["model", "--model", "7b"], "--fit model does not take --model: it finds the model"),
        (["model", "model.dim=4096"], "--fit model does not take model.dim"),
        (["model", "model={n_heads: 8}"], "--fit model does not take model.n_heads"),
        (["model", "--interconnect", "50"], "--fit model does not take --interconnect"),
        (["model", "model.n_kv_heads=300"], "at most 256 heads"),
        (["tokens", "--memory", "3", *RINGS], "nothing fits: no sample of 1,024 tokens or more will do, with 0.9 GiB"),
        (["devices", "parallel.zero_stage=0", *RINGS], "precision=bf16 needs parallel.zero_stage 1, 2 or 3"),
        (
            ["devices", "--memory", "2.01", *RINGS, "parallel.ring=1"],
            "nothing fits, of any number up to 8 on one host, whole hosts up to 1,024, then every 16 hosts",
        ),
        (["tokens", "parallel.tensor=3"], "parallel.tensor=3 does not divide model.n_heads=32"),
    ],
)
def test_what_cannot_be_heeded_is_refused(words, sentence, capsys):
    assert main(["plan", "--fit", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_held_size_is_of_the_model_that_is_planned():
    assert work_of(asked(*SMALL, fit="tokens", tokens=None))[0].sizes == FlagDiTConfig(
        dim=512, n_layers=4, n_heads=8, n_kv_heads=4, cap_feat_dim=4096
    )
