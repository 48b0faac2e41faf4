"""The verbs of `lumina data`. One thin function each; torch and the rest of the house are imported inside it."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


def add_data(verbs: argparse._SubParsersAction, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add `data` and what is below it."""
    data = verbs.add_parser(
        "data",
        help="make and index data",
        description="Make small real data sets that need no download, and index shards.",
        example="lumina data digits data/digits",
    )
    recipes = data.add_subparsers(dest="recipe", required=True, metavar="WHAT", parser_class=parser_class)
    digits = recipes.add_parser(
        "digits",
        help="scikit-learn's 1,797 handwritten digits with captions",
        description="Write scikit-learn's 1,797 handwritten digits with captions as webdataset shards and their index.",
        example="lumina data digits data/digits",
    )
    digits.add_argument("out", metavar="OUT", help="a new or empty folder")
    digits.set_defaults(run=_data_digits)
    _add_generated(recipes)
    index = recipes.add_parser(
        "index",
        help="index shards",
        description="Read shards, check them and write an index beside each: tar files, folders of them, globs, "
        "ranges such as s-{000..019}.tar, and URLs of these. Interrupted, it goes on where it was; several hosts may "
        "do it at once.",
        example="lumina data index 'https://host/photos-{000000..000099}.tar' --index-dir indexes",
    )
    index.add_argument("shards", nargs="+", metavar="SHARDS")
    index.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    index.add_argument("--index-dir", metavar="DIR", help="for indexes that cannot lie beside their shards, as of URLs")
    index.add_argument(
        "--allow-pipe", nargs="+", default=[], metavar="PROGRAM", help="programs that pipe:COMMAND shards may run"
    )
    index.set_defaults(run=_data_index)
    _add_making(recipes)
    check = recipes.add_parser(
        "check",
        help="verify shards against their indexes",
        description="Read shards (tar files, folders of them, or patterns) from end to end and compare sizes, hashes, "
        "headers and the CRC of every member with their indexes; name missing shards, repeated keys and contents, and "
        "empty captions. The exit code is 1 when something is wrong, 0 when there are warnings only.",
        example="lumina data check 'data/photos/*.tar' --decode --workers 4",
    )
    check.add_argument("shards", nargs="+", metavar="SHARDS")
    check.add_argument("--decode", action="store_true", help="decode every sample, too")
    check.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core, at most 8)")
    check.add_argument("--json", action="store_true", help="for machines")
    check.set_defaults(run=_data_check)
    show = recipes.add_parser(
        "show",
        help="say and picture what a global batch would be",
        description="Print the packs of the global batch of a step, from where the run stands, with each sample's "
        "tokens, size, key and caption; and draw them.",
        example="lumina data show configs/digits.yaml --step 3 --out batch.png",
    )
    show.add_argument("config", metavar="CONFIG", help="YAML file of a run")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    show.add_argument("--step", type=int, default=1, metavar="N", help="of training (default 1)")
    show.add_argument("--out", metavar="PNG", help="a picture of the batch, a row a pack")
    show.set_defaults(run=_data_show)
    encode = recipes.add_parser(
        "encode",
        help="write latents and caption features, so that training needs no encoders",
        description="Write what the autoencoder and the text encoder of a run make of its data into new shards. "
        "Started by torchrun, deepspeed or srun, each process takes its part; started again, it goes on.",
        example="lumina data encode configs/digits.yaml data/digits-encoded",
    )
    encode.add_argument("config", metavar="CONFIG", help="YAML file of a run")
    encode.add_argument("out", metavar="OUT", help="a new folder, or one to go on with")
    encode.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    encode.add_argument("--crops", type=int, default=1, metavar="N", help="views of each sample (default 1)")
    encode.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of what is written (default fp16)")
    encode.set_defaults(run=_data_encode)


def _add_generated(recipes: argparse._SubParsersAction) -> None:
    """The verbs that make other small sets; the bytes depend on the seed and the options, not on the processes."""
    sheets = recipes.add_parser(
        "digit-sheets",
        help="one to four real digits of a kind beside each other",
        description="Write pictures of one, two or four of scikit-learn's handwritten digits, all the same digit, with "
        "captions, as webdataset shards and their index: a model of them can be given captions for regions.",
        example="lumina data digit-sheets data/digit-sheets",
    )
    sheets.set_defaults(run=_data_digit_sheets)
    moving = recipes.add_parser(
        "moving-digits",
        help="videos of real handwritten digits that move as the caption says",
        description="Write videos of scikit-learn's handwritten digits that move left, right, up or down over a small "
        "canvas, with captions, as webdataset shards and their index. A fifth of the digits is kept apart for judges.",
        example="lumina data moving-digits data/moving-digits",
    )
    moving.add_argument("--frames", type=int, default=4, metavar="N", help="of each video (default 4)")
    moving.add_argument("--size", type=int, default=16, metavar="PIXELS", help="height and width (default 16)")
    moving.set_defaults(run=_data_moving_digits)
    turntable = recipes.add_parser(
        "turntable",
        help="coloured solids rendered from twelve sides",
        description="Render cubes, spheres, cones, cylinders, tori and pyramids in six colours, each from twelve "
        "sides as it turns, with captions, as webdataset shards and their index.",
        example="lumina data turntable data/turntable",
    )
    turntable.add_argument("--size", type=int, default=16, metavar="PIXELS", help="height and width (default 16)")
    turntable.set_defaults(run=_data_turntable)
    speech = recipes.add_parser(
        "speech",
        help="words spoken by espeak-ng's voices, as spectrograms",
        description="Let the voices of espeak-ng (apt-get install espeak-ng) say the digits' names, and write their "
        "80-band mel spectrograms and sound with captions as webdataset shards and their index.",
        example="lumina data speech data/speech",
    )
    speech.add_argument(
        "--width",
        type=int,
        default=48,
        metavar="N",
        help="columns of 256 samples, a multiple of the patch (default 48)",
    )
    speech.add_argument("--held", action="store_true", help="by the voices that are kept apart, for judges")
    speech.set_defaults(run=_data_speech)
    for verb, count, what in (
        (sheets, 4000, "sheets"),
        (moving, 3000, "videos"),
        (turntable, 1440, "objects"),
        (speech, 1500, "words"),
    ):
        verb.add_argument("out", metavar="OUT", help="a new or empty folder")
        verb.add_argument("--count", type=int, default=count, metavar="N", help=f"{what} (default {count})")
        verb.add_argument("--seed", type=int, default=0, metavar="N", help="chooses all that is random (default 0)")
        verb.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core, at most 8)")


def _add_making(recipes: argparse._SubParsersAction) -> None:
    """The verbs that make shards of what people have."""
    folder = recipes.add_parser(
        "folder",
        help="make shards of a folder of pictures with captions beside them",
        description="Write all pictures, videos and audio below SRC into shards, byte for byte, with their captions: "
        'the .txt of the same name, or "caption" in the .json of the same name.',
        example="lumina data folder photos data/photos --skip-uncaptioned",
    )
    folder.add_argument("source", metavar="SRC")
    folder.add_argument(
        "--caption-from",
        choices=("file", "name", "folder", "none"),
        default="file",
        help="the file beside (default), the file's own name, the name of its folder, or no captions",
    )
    folder.add_argument(
        "--label-from", choices=("folder",), help="class numbers by sorted folder names, listed in OUT/classes.json"
    )
    folder.add_argument("--skip-uncaptioned", action="store_true", help="leave out files without a usable caption")
    folder.set_defaults(run=_data_folder)
    table = recipes.add_parser(
        "table",
        help="make shards of what a CSV, TSV, JSON or JSONL file names",
        description="Write the files that a table names into shards, byte for byte, with their captions and labels. "
        "FILE is .csv or .tsv with a header, .json (a list of objects) or .jsonl, also with .gz behind.",
        example="lumina data table photos.csv data/photos --media file --caption text --root photos",
    )
    table.add_argument("table", metavar="FILE")
    table.add_argument("--media", required=True, metavar="COLUMN", help="of the path of the file")
    table.add_argument("--caption", metavar="COLUMN", help="of the caption")
    table.add_argument("--label", metavar="COLUMN", help="of the class, a whole number from 0")
    table.add_argument("--root", metavar="DIR", help="what paths are relative to (default: the folder of FILE)")
    table.set_defaults(run=_data_table)
    public = recipes.add_parser(
        "lumina",
        help="make shards of a data description of the public Lumina-T2X",
        description="Write what a public data description names into shards, byte for byte. CONFIG is YAML, META: "
        "[{path: items.json, root: folder, ratio: 0.5, type: …}], whose relative paths start from its own folder. "
        "A ratio below 1 keeps that share of the items. Each of several entries has a sub folder of OUT, and the "
        "sets that blend them as described are printed, for the configuration of a run.",
        example="lumina data lumina data.yaml data/lumina --shuffle 0",
    )
    public.add_argument("config", metavar="CONFIG")
    public.add_argument("--seed", type=int, default=0, help="chooses the share that a ratio keeps (default 0)")
    public.set_defaults(run=_data_lumina)
    for verb in (table, public):
        verb.add_argument("--skip-missing", action="store_true", help="leave out what is missing or wrong")
    for verb in (folder, table, public):
        verb.add_argument("out", metavar="OUT", help="a new or empty folder; after a kill, repeat the command to go on")
        verb.add_argument("--shard-size", default="1GiB", metavar="BYTES", help="also 500MB, 2GiB, … (default 1GiB)")
        verb.add_argument("--samples-per-shard", type=int, metavar="N", help="at most so many (default: no limit)")
        verb.add_argument("--shuffle", type=int, metavar="SEED", help="mix all samples of a set (default: in order)")
        verb.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core, at most 8)")


def _data_digits(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.digits import write_digits

    summary = write_digits(arguments.out)
    print(f"{summary.samples:,} digits in {summary.shards} shards under {arguments.out}")


def _data_digit_sheets(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.digit_sheets import write_digit_sheets

    _generate(arguments, write_digit_sheets, "sheets")


def _data_moving_digits(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.moving_digits import write_moving_digits

    _generate(arguments, write_moving_digits, "videos", frames=arguments.frames, size=arguments.size)


def _data_turntable(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.turntable import write_turntable

    _generate(arguments, write_turntable, "objects", size=arguments.size)


def _data_speech(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.speech import write_speech
    from lumina.encoders.speech import normalised_mel

    recipe = partial(write_speech, spectrogram=normalised_mel)
    _generate(arguments, recipe, "words", width=arguments.width, held=arguments.held)


def _generate(arguments: argparse.Namespace, recipe: Callable[..., Any], what: str, **options: Any) -> None:
    with _bar("making") as update:
        summary = recipe(
            arguments.out,
            count=arguments.count,
            seed=arguments.seed,
            workers=arguments.workers,
            progress=lambda done, total: update(completed=done, total=total),
            **options,
        )
    shards = "1 shard" if summary.shards == 1 else f"{summary.shards:,} shards"
    print(f"{summary.samples:,} {what} in {shards} under {arguments.out}")


def _data_index(arguments: argparse.Namespace) -> None:
    from lumina.data.indexing import index_shards
    from lumina.data.processes import usable_cores

    with _bar("indexing") as update:
        count = index_shards(
            arguments.shards,
            lambda done, total: update(completed=done, total=total),
            workers=usable_cores() if arguments.workers is None else arguments.workers,
            index_dir=arguments.index_dir,
            pipe_programs=arguments.allow_pipe,
        )
    print(f"{count:,} samples indexed")


def _data_folder(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.folder import folder_to_shards

    _make_shards(
        arguments,
        folder_to_shards,
        arguments.source,
        caption_from=arguments.caption_from,
        label_from=arguments.label_from,
        skip_uncaptioned=arguments.skip_uncaptioned,
    )


def _data_table(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.table import table_to_shards

    _make_shards(
        arguments,
        table_to_shards,
        arguments.table,
        media=arguments.media,
        caption=arguments.caption,
        label=arguments.label,
        root=arguments.root,
        skip_missing=arguments.skip_missing,
    )


def _data_lumina(arguments: argparse.Namespace) -> None:
    from lumina.data.recipes.lumina_json import blend, lumina_to_shards

    _make_shards(
        arguments, lumina_to_shards, arguments.config, seed=arguments.seed, skip_missing=arguments.skip_missing
    )
    if sets := blend(arguments.out):
        print(f"to train on all of them, put into the configuration of the run:\n\n{sets}", end="")


def _make_shards(arguments: argparse.Namespace, recipe: Callable[..., Any], source: str, **options: Any) -> None:
    from lumina.data.recipes.making import Layout, parse_bytes

    layout = Layout(
        shard_size=parse_bytes(arguments.shard_size),
        samples_per_shard=arguments.samples_per_shard,
        shuffle=arguments.shuffle,
        workers=arguments.workers,
    )
    with _bar("listing") as update:
        summary = recipe(
            source,
            arguments.out,
            layout=layout,
            progress=lambda stage, done, total: update(description=stage, completed=done, total=total or None),
            **options,
        )
    shards = "1 shard" if summary.shards == 1 else f"{summary.shards:,} shards"
    print(f"{summary.samples:,} samples in {shards} ({summary.bytes:,} bytes) under {arguments.out}")
    for reason, count in sorted(summary.skipped.items()):
        print(f"left out: {count:,} × {reason}")
    if summary.report is not None:
        print(f"what was left out is listed in {summary.report}")


def _data_check(arguments: argparse.Namespace) -> None:
    import json

    from lumina.data.check import check_shards

    with _bar("checking") as update:
        report = check_shards(
            arguments.shards,
            decode=arguments.decode,
            workers=arguments.workers,
            progress=lambda done, total: update(completed=done, total=total),
        )
    print(json.dumps(report.as_dict(), indent=1) if arguments.json else report.as_text())
    if report.errors:
        from lumina.cli import EXIT_FAILED

        raise SystemExit(EXIT_FAILED)


@contextmanager
def _bar(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal's stderr, nothing elsewhere; yields what sets its completed, total, description."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield partial(progress.update, progress.add_task(description, total=None))


def _data_show(arguments: argparse.Namespace) -> None:
    from lumina.train.show import show

    show(arguments)


def _data_encode(arguments: argparse.Namespace) -> None:
    from lumina.train.encode import encode

    encode(arguments)
