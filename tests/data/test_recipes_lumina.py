"""The public data description: both kinds of items, shares that stay, weights, and errors that name the entry."""

import json
from pathlib import Path

import pytest
import yaml

from lumina.cli import main
from lumina.config.schema import DataConfig
from lumina.data.index import Index
from lumina.data.recipes.lumina_json import blend, lumina_to_shards
from lumina.data.recipes.making import Layout
from lumina.train.assemble import sets_of
from tests.data.pictures import digit_png, files, members

ONE = Layout(workers=1)


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": value} for who, value in turns]


def described(tmp_path: Path, *entries: dict[str, object]) -> Path:
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"META": list(entries)}))
    return path


def pictures(folder: Path, count: int) -> list[dict[str, str]]:
    for number in range(count):
        digit_png(number, folder / f"{number:03d}.png")
    return [{"path": f"{number:03d}.png", "prompt": f"prompt {number}"} for number in range(count)]


def captions(folder: Path) -> dict[str, str]:
    return {name: data.decode() for shard in members(folder).values() for name, data in shard if name.endswith(".txt")}


def test_both_kinds_of_items(tmp_path: Path) -> None:
    items = pictures(tmp_path / "root", 4)
    items[1] = {
        "image": "001.png",
        "conversations": conversation(("human", "<image>\ndescribe"), ("gpt", "first"), ("gpt", "second")),
    }
    items[2] = {"image_url": "002.png", "conversations": conversation(("gpt", "<image>\na <image> b\n"))}
    items[3]["path"] = str(tmp_path / "root" / "003.png")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "x.json").write_text(json.dumps(items))
    config = described(tmp_path, {"path": "meta/x.json", "root": "root", "type": "photo", "ratio": 3})
    summary = lumina_to_shards(config, tmp_path / "out", layout=ONE)
    assert summary.samples == 4
    assert captions(tmp_path / "out") == {
        "000.txt": "prompt 0",
        "001.txt": "first",
        "002.txt": "a b",
        "003.txt": "prompt 3",
    }
    assert json.loads((tmp_path / "out" / "weights.json").read_text()) == [
        {"folder": ".", "type": "photo", "weight": 12.0}
    ]
    assert blend(tmp_path / "out") is None


def test_several_entries_are_sets_of_their_own(tmp_path: Path) -> None:
    items = pictures(tmp_path, 30)
    (tmp_path / "a").mkdir()
    for name, content in (("x.json", items[:10]), ("a/x.json", items[10:20])):
        (tmp_path / name).write_text(json.dumps([item | {"path": str(tmp_path / item["path"])} for item in content]))
    (tmp_path / "z.jsonl").write_text("\n".join(map(json.dumps, items[20:])))
    config = described(
        tmp_path, {"path": "x.json"}, {"path": "a/x.json", "ratio": 2.5}, {"path": "z.jsonl", "ratio": 0.5, "type": "z"}
    )
    summary = lumina_to_shards(config, tmp_path / "out", layout=Layout(samples_per_shard=4, workers=2))
    sets = {name: Index.open([tmp_path / "out" / name], build_missing=False) for name in ("x", "x-2", "z")}
    assert (len(sets["x"]), len(sets["x-2"])) == (10, 10)
    assert 0 < len(sets["z"]) < 10
    assert summary.samples == 20 + len(sets["z"])
    assert sets["x-2"].read(0)["txt"] == b"prompt 10"
    # Items of a set with ratio 2.5 come 2.5 times as often as those of one with ratio 1, however many there are.
    assert json.loads((tmp_path / "out" / "weights.json").read_text()) == [
        {"folder": "x", "type": "default", "weight": 10.0},
        {"folder": "x-2", "type": "default", "weight": 25.0},
        {"folder": "z", "type": "z", "weight": float(len(sets["z"]))},
    ]
    together = Index.open([tmp_path / "out" / name for name in sets])
    assert len(together) == summary.samples


def test_the_command_prints_what_a_run_needs(tmp_path: Path, capsys) -> None:
    items = pictures(tmp_path, 12)
    for name, content in (("a b", items[:8]), ("c", items[8:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    config = described(tmp_path, {"path": "a b.json"}, {"path": "c.json", "ratio": 3})
    out = tmp_path / "o: ü"
    assert main(["data", "lumina", str(config), str(out), "--workers", "1"]) == 0
    said, _, snippet = capsys.readouterr().out.partition("\n\n")
    assert said.endswith("to train on all of them, put into the configuration of the run:")
    assert "ü" in snippet
    assert max(map(len, snippet.splitlines())) > 40, "paths are not broken"
    data = DataConfig.model_validate(yaml.safe_load(snippet)["data"])
    assert [(of.shards, of.weight) for of in data.sets] == [([f"{out}/a_b"], 8.0), ([f"{out}/c"], 12.0)]
    index = Index.open(*sets_of(data))
    assert (len(index), index.weights) == (12, [8.0, 12.0])
    described(tmp_path, {"path": "c.json", "ratio": 3})
    assert main(["data", "lumina", str(config), str(tmp_path / "one"), "--workers", "1"]) == 0
    assert "to train" not in capsys.readouterr().out


def test_a_share_is_chosen_by_item_and_seed(tmp_path: Path) -> None:
    items = pictures(tmp_path, 1)
    items = [{"path": "000.png", "prompt": f"p{number}"} for number in range(2000)]
    (tmp_path / "x.json").write_text(json.dumps(items))

    def kept(ratio: float, seed: int, name: str) -> set[str]:
        config = described(tmp_path, {"path": "x.json", "ratio": ratio})
        lumina_to_shards(config, tmp_path / name, seed=seed, layout=ONE)
        return set(captions(tmp_path / name).values())

    quarter = kept(0.25, 0, "a")
    assert abs(len(quarter) - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    assert quarter < kept(0.5, 0, "b")  # a larger share holds the smaller
    other = kept(0.25, 1, "c")
    assert abs(len(quarter & other) - 125) < 5 * 125**0.5
    # The others do not move when items are added or turned round.
    (tmp_path / "x.json").write_text(json.dumps([*items[::-1], {"path": "000.png", "prompt": "new"}]))
    assert kept(0.25, 0, "d") - {"new"} == quarter


def test_wrong_items_are_refused_or_skipped_and_listed(tmp_path: Path) -> None:
    good = pictures(tmp_path, 1)[0]
    wrong = [
        ({"path": "none.png", "prompt": "a"}, "missing file", "No such file"),
        ({"prompt": "a"}, "wrong item", "it has none of path, image, image_url"),
        ({"path": ["000.png"], "prompt": "a"}, "wrong path", "is no path"),
        ({"path": "s3://bucket/0.png", "prompt": "a"}, "wrong path", "is an address"),
        ({"path": "000.png"}, "no usable caption", 'it has no "prompt" nor "conversations"'),
        ({"path": "000.png", "prompt": " "}, "no usable caption", "empty"),
        ({"path": "000.png", "prompt": ["a"]}, "no usable caption", "not list"),
        ({"image": "000.png", "conversations": []}, "no usable caption", 'no turn from "gpt"'),
        ({"image": "000.png", "conversations": conversation(("gpt", "<image>"))}, "no usable caption", "empty"),
        ({"image": "000.png", "conversations": [{"from": "gpt"}]}, "no usable caption", "no text in its turn"),
        ("text", "wrong item", "it is no object but str"),
    ]
    (tmp_path / "x.json").write_text(json.dumps([good, *(item for item, *_ in wrong), good]))
    config = described(tmp_path, {"path": "x.json"})
    with pytest.raises(ValueError, match=r"6 × no usable caption, .* item 2 of x.json .*by --skip-missing$"):
        lumina_to_shards(config, tmp_path / "out", layout=ONE)
    assert {path.name for path in tmp_path.iterdir()} == {"000.png", "x.json", "data.yaml", "out.problems.jsonl"}
    summary = lumina_to_shards(config, tmp_path / "out", skip_missing=True, layout=ONE)
    assert summary.samples == 2
    found = [json.loads(line) for line in summary.report.read_text().splitlines()]
    assert [record["item"] for record in found] == [f"item {number} of x.json" for number in range(2, 13)]
    for record, (_, reason, detail) in zip(found, wrong, strict=True):
        assert record["reason"] == reason
        assert detail in record["detail"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "META: [{path: x.json, ration: 2}]",
            r"entry 1 of .*data.yaml has the unknown key 'ration'; did you mean ratio\?",
        ),
        ("META: [{path: x.json}, {path: none.json}]", "META entry 2 of .* path .*none.json is missing"),
        ("META: [{path: x.json, root: none}]", "root .*none is no folder"),
        ("META: [{path: x.json, ratio: 0}]", "ratio must be a number above 0, not 0"),
        ("META: [{path: x.json, ratio: .inf}]", "ratio must be a number above 0"),
        ("META: [{path: x.json, ratio: true}]", "ratio must be a number above 0"),
        ("META: [{root: .}]", "path must be text, not None"),
        ("META: [{path: x.json, type: 3}]", "type must be text, not 3"),
        ("META: [x.json]", "must be {path: …"),
        ("META: []", "must hold META, a list"),
        ("META: {path: x.json}", "must hold META, a list"),
        ("META: [", "is no YAML"),
        ("!!python/object/apply:os.system ['touch pwned']", "is no YAML"),
        ("META: [{path: x.json, ratio: 0.0000001}]", "there are no samples to write"),
        ("META: [{path: data.yaml}]", "data.yaml is no .csv"),
    ],
)
def test_descriptions_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps(pictures(tmp_path, 1)))
    (tmp_path / "data.yaml").write_text(text)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        lumina_to_shards(tmp_path / "data.yaml", tmp_path / "out", layout=ONE)
    assert files(tmp_path) == before
