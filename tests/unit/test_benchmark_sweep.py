"""`lumina benchmark throughput --sweep` and --compare: points in fresh processes, tables, plots, ratios."""

import contextlib
import csv
import io
import json
import os
import re
import signal
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lumina.benchmark.compare import comparison, read_record
from lumina.benchmark.sweep import _PRELOAD, _Report, points_of
from lumina.benchmark.throughput import Row
from lumina.benchmark.throughput_plot import draw
from lumina.benchmark.throughput_table import Entry, table_of, write_csv
from lumina.cli import _parser, main
from lumina.config.exits import BAD_INPUT
from lumina.config.schema import ParallelConfig
from lumina.parallel import fresh_ranks
from lumina.parallel.fresh_ranks import Failure, FreshRanks
from lumina.parallel.mesh import open_mesh
from tests.parallel.workers import free_port, run_ranks

SMALL = ["model.dim=48", "model.n_layers=2", "model.n_heads=4", "model.cap_feat_dim=8", "model.multiple_of=16"]
WORDS = ["benchmark", "throughput", "--text-tokens", "6", "--dtype", "fp32"]
# Beyond the addresses that a process can have, so that it is refused at once.
TOO_MANY = 10**13
ROW = {
    "model": "600m",
    "parameters": 108168,
    "layout": "2 (ring 2), ZeRO 1",
    "precision": "fp32",
    "recompute": "none",
    "world": 2,
    "tokens_per_sample": 72,
    "text_tokens": 6,
    "samples": 1,
    "tokens_per_second": 50.0,
    "model_tflops": 0.25,
    "memory": {"peak": 2**20},
}
FACTS = {"date": "2020-01-01 00:00 UTC", "device": "an abacus", "python": "3.11.0", "packages": {"torch": "1.0"}}


def totals(store, value):
    mesh = open_mesh(ParallelConfig(), store)
    return mesh.sum([value + mesh.world.rank])[0], mesh.largest(-1.5 * mesh.world.rank), os.getpid()


def fails_on_the_last(store, how):
    mesh = open_mesh(ParallelConfig(), store)
    mesh.barrier()
    if mesh.world.rank == mesh.world.size - 1:
        if how == "raise":
            raise MemoryError("no room\nfor it")
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.barrier()  # never answered


def refuses(store, kind):
    raise kind("a sentence")


def exits(store):
    os._exit(3)


def of_rank(rank, folder, port):
    with FreshRanks((*_PRELOAD, __name__)) as ranks:
        found = [ranks.run(totals, 3), ranks.run(fails_on_the_last, "raise"), ranks.run(totals, 4)]
        found += [ranks.run(fails_on_the_last, "kill"), ranks.run(totals, 5)]
    os.environ["MASTER_PORT"] = str(port)
    files = ["--out", f"{folder}/out.json", "--csv", f"{folder}/csv.csv", "--plot", f"{folder}/plot.png"]
    swept = [
        "--sweep",
        "layouts",
        "--sweep",
        "tokens",
        "--tokens",
        "72",
        str(TOO_MANY),
        "--layout",
        "zero=0",
        "ring=2,zero=1",
    ]
    rest = ["--steps", "2", "--warm-up", "0", "--profile-steps", "0", "--peak", "0.5"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main([*WORDS, *rest, *files, "--compare", f"{folder}/earlier.json", *swept, *SMALL])
    return os.getpid(), found, code, said.getvalue()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "earlier.json").write_text(json.dumps(FACTS | {"rows": [ROW]}))
    return SimpleNamespace(folder=folder, ranks=run_ranks(2, of_rank, str(folder), free_port()))


@pytest.mark.slow
def test_what_fails_on_one_rank_is_ended_on_all(told):
    pids = [pid for pid, *_ in told.ranks]
    for _, (first, out_of_memory, second, killed, third), *_ in told.ranks:
        assert (first[:2], second[:2], third[:2]) == ((7, 0), (9, 0), (11, 0))
        pids += [first[2], second[2], third[2]]
        assert out_of_memory == Failure(1, "out of memory: no room for it")
        assert killed == Failure(1, "out of memory, by all appearances: the system killed the process (SIGKILL)")
    assert len(set(pids)) == 8  # each piece of work had processes of its own


def test_fresh_processes_of_a_single_rank(monkeypatch):
    monkeypatch.setattr(fresh_ranks, "_GRACE", 0)  # no other rank can be the cause
    with FreshRanks(_PRELOAD) as ranks:
        assert ranks.run(totals, 2)[:2] == (2, 0)
        assert ranks.run(refuses, ValueError) == Failure(0, "a sentence")
        assert ranks.run(refuses, KeyError) == Failure(0, "KeyError: 'a sentence'")
        assert ranks.run(exits) == Failure(0, "the process ended with exit code 3")


@pytest.mark.slow
def test_points_that_fail_take_no_others_with_them(told):
    assert [code for _, _, code, _ in told.ranks] == [0, 0]
    assert told.ranks[1][3] == ""
    written = json.loads((told.folder / "out.json").read_text())
    layouts = ["2 (data 2), ZeRO 0", "2 (ring 2), ZeRO 1"]
    assert [(row["layout"], row["samples"], row["tokens"]) for row in written["rows"]] == [
        (layouts[0], 2, 144),
        (layouts[1], 1, 72),
    ]
    assert [line.split(": ")[2] for line in written["missing"]] == ["out of memory"] * 2
    assert (written["sweep"], written["refused"]) == (["layouts", "tokens"], [])
    assert "torch" in written["packages"]
    with (told.folder / "csv.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["layout"], bool(line["failure"])) for line in lines] == [
        (layout, failed) for layout in layouts for failed in (False, True)
    ]
    for line, row in zip(lines[::2], written["rows"], strict=True):
        assert float(line["tokens_per_second"]) == row["tokens_per_second"]
        assert int(line["memory_peak"]) == row["memory"]["peak"]
        assert float(line["mfu"]) == pytest.approx(row["model_tflops"] / 0.5)
    assert lines[1]["failure"].startswith("out of memory: ")
    assert lines[1]["seconds"] == ""
    not_blank(told.folder / "plot.png")
    said = told.ranks[0][3]
    assert said.count("| out of memory ") == 2
    # Beside the record made by hand, the data-parallel row has no counterpart.
    ring = written["rows"][1]
    peak = ring["memory"]["peak"] / 2**20
    ratios = f"| {ring['tokens_per_second'] / 50:.3f} *| {ring['model_tflops'] * 4:.3f} *| {peak:.3f} "
    assert re.search(ratios, said)
    assert f"not in {told.folder}/earlier.json: 600m, 2 (data 2), ZeRO 0, 72 tokens; the nearest there has" in said
    assert "device: an abacus there, " in said


def not_blank(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 200
    halves = np.array_split(pixels, 2, axis=1)
    # Of both panels: white paper, and marks of some colour, not of grey alone.
    assert all(half.min() < 100 < 250 < half.max() for half in halves)
    assert all((np.ptp(half.astype(int), axis=2) > 60).sum() > 50 for half in halves)


def arguments_of(*words):
    return _parser().parse_args([*WORDS, "--tokens", "72", *words, *SMALL])


def test_every_layout_of_four_ranks():
    """Of four axes and ZeRO: 15 products that divide 4, each with 4 stages."""
    points, refused = points_of(arguments_of("--sweep", "layouts"), 4)
    found = {point.layout for point in points}
    assert len(found) == len(points) == 48
    assert {"zero=0", "zero=3", "tp=2,ring=2,zero=3", "pp=2,ulysses=2,zero=1", "tp=4,zero=2"} <= found
    # Four stages of two blocks; two stages with ZeRO 2 or 3.
    assert [one["layout"] for one in refused if "4 stages" in one["why"]] == [
        f"pp=4,zero={stage}" for stage in range(4)
    ]
    assert len(refused) == 12
    assert not found & {one["layout"] for one in refused}


def test_settings_may_stand_behind_what_is_swept():
    words = ["--tokens", "72", "144", "train.clip_norm=0.5", "--sweep", "tokens"]
    points, _ = points_of(arguments_of(*words, "--layout", "zero=1", "parallel.recompute=full", "precision=fp32"), 1)
    assert [(point.tokens, point.layout) for point in points] == [(72, "zero=1"), (144, "zero=1")]
    assert {"train.clip_norm=0.5", "parallel.recompute=full", "precision=fp32"} <= set(points[0].overrides)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "72", "144"], "several of --tokens (72 144) are measured by --sweep tokens"),
        (["--sweep", "model"], "a sweep of model takes several, as --model 600m 3b"),
        (["--tokens", "many"], "--tokens many is no whole number"),
        (["--sweep", "layouts", "--layout", "ring=2", "zero=1"], "a world of 1 processes cannot be laid out as"),
        (["--sweep", "layouts", "parallel.ring=2"], "parallel.ring is what a sweep of all layouts changes"),
        (["--plot", "p.png"], "--plot is of a sweep and --trace of one point"),
        (["--sweep", "layouts", "--trace", "t.json"], "--plot is of a sweep and --trace of one point"),
        (["--sweep", "layouts", "--plot", "p.gif"], "--plot p.gif: pictures end in .png, .svg, .pdf"),
        (["--csv", "/no/such/folder/x.csv"], "--csv /no/such/folder/x.csv: there is no folder /no/such/folder"),
        (["--compare", "/no/such/file"], "--compare /no/such/file cannot be read: No such file or directory"),
        (["--peak", "0"], "--peak 0: it is more than 0 TFLOP/s"),
    ],
)
def test_what_is_refused(capsys, words, sentence):
    assert main([*WORDS, *words, *SMALL]) == BAD_INPUT
    assert sentence in capsys.readouterr().err


def entries():
    points, _ = points_of(arguments_of("--sweep", "layouts", "--peak", "measured"), 2)
    made = [row_of(point, 100.0 * (1 + number)) for number, point in enumerate(points[:3])]
    return points, [*map(Entry.of, points, [*made, Failure(1, "out of memory: of a GPU")], [2] * 4)]


def row_of(point, speed):
    numbers = {field.name: 1 if field.type is int else 1.0 for field in fields(Row)}
    words = dict.fromkeys(("layout", "precision", "recompute"), "") | {
        "model": point.model,
        "by_category": {},
        "hidden": {},
        "memory": {"peak": 3 * 2**20},
    }
    return Row(**numbers | words | {"mfu": None, "peak_tflops": speed, "tokens_per_second": speed})


def test_a_failed_point_is_a_row_that_says_so(tmp_path):
    _, made = entries()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of(made).splitlines()]
    assert lines[2] == ["2 (data 2), ZeRO 0", "600m", "72", "1", "100", "1", "–", "3.0"]
    assert lines[5] == ["2 (data 2), ZeRO 3", "600m", "72", "out of memory", "–", "–", "–", "–"]
    write_csv(str(tmp_path / "table.csv"), made)
    with (tmp_path / "table.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["tokens_per_second"] for line in found] == ["100.0", "200.0", "300.0", ""]
    assert [line["failure"] for line in found] == ["", "", "", "out of memory: of a GPU"]
    draw(str(tmp_path / "bars.png"), made)
    not_blank(tmp_path / "bars.png")
    draw(str(tmp_path / "bars.svg"), made)
    assert (tmp_path / "bars.svg").read_text().count("<svg") == 1


def test_a_peak_is_measured_once():
    points, made = entries()
    report = _Report(arguments_of("--sweep", "layouts", "--peak", "measured"), [], 2)
    assert report.with_known_peak(points[0]).peak == "measured"
    report.add(points[3], Failure(1, "out of memory"), {})
    assert report.with_known_peak(points[0]).peak == "measured"
    report.add(points[0], made[0].row, FACTS)
    assert report.with_known_peak(points[1]).peak == 100.0
    assert report.results.facts["device"] == "an abacus"


def test_ratios_to_an_earlier_record():
    now = FACTS | {"python": "3.12.0", "packages": {"torch": "2.0", "numpy": "2.4"}}
    fast = ROW | {"tokens_per_second": 125.0, "model_tflops": 0.5, "memory": {"peak": 2**19}}
    wide = ROW | {"world": 4, "layout": "4 (ring 4), ZeRO 1"}
    text = comparison(now | {"rows": [fast, wide]}, FACTS | {"rows": [ROW, ROW | {"recompute": "full"}]}, "old.json")
    lines = text.splitlines()
    assert lines[0] == "Ratios to old.json, of 2020-01-01 00:00 UTC:"
    assert [cell.strip() for cell in lines[3].split("|")[3:-1]] == ["72", "2.500", "2.000", "0.500"]
    assert lines[4:] == [
        "not in old.json: 600m, 4 (ring 4), ZeRO 1, 72 tokens; the nearest there has layout '2 (ring 2), ZeRO 1', not "
        "'4 (ring 4), ZeRO 1' and world 2, not 4",
        "only in old.json: 600m, 2 (ring 2), ZeRO 1, 72 tokens; the nearest here has recompute 'none', not 'full'",
        "python: 3.11.0 there, 3.12.0 here",
        "numpy: not installed there, 2.4 here",
        "torch: 1.0 there, 2.0 here",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "it has no list `rows`"),
        ({"rows": [{"hidden": 1536}]}, "it does not say its date"),
        (FACTS | {"rows": [3]}, "row 0, counted from 0, is 3"),
        (FACTS | {"rows": [ROW, {"model": "600m"}]}, "row 1, counted from 0, has no parameters"),
        (FACTS | {"rows": [ROW | {"world": "two"}]}, "world of row 0, counted from 0, is 'two'"),
        (FACTS | {"rows": [ROW | {"model_tflops": 0}]}, "model_tflops of row 0, counted from 0, is 0"),
        (FACTS | {"rows": [ROW | {"memory": 7}]}, "memory.peak of row 0, counted from 0, is None"),
    ],
)
def test_what_is_no_record(tmp_path, content, sentence):
    path = tmp_path / "record.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"^--compare {path} is no") as caught:
        read_record(str(path))
    assert sentence in str(caught.value)
    path.write_text(json.dumps(FACTS | {"rows": [ROW]}))
    assert read_record(str(path))["rows"] == [ROW]
