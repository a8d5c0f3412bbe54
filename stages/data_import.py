"""`mpl data import`: a person's own images into a data set, or into the pool of one."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.classes import SHOWN
from pipeline.data.get.found import Source
from pipeline.data.get.importing import LEFT_OUT, Imported, ImportSettings, append_images, import_images
from pipeline.data.manifest import SplitName
from pipeline.data.readers.shard import LeftOut
from pipeline.errors import UsageError
from stages.terminal import say

FEW = 1_000  # labelled images: with fewer, what is set aside is missed in training


class ShareOrSource(click.ParamType):
    """A part of the labelled images, or where other images are."""

    name = "PART|FOLDER"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> float | Path:
        try:
            return float(value)
        except ValueError:
            return click.Path(path_type=Path, exists=True).convert(value, param, ctx)


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the data set.  [default: that of OUT]")
@click.option(
    "--unlabelled",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Folder, archive or table of images for the pool; repeatable.",
)
@click.option(
    "--validation",
    type=ShareOrSource(),
    help="Part of each class for choosing, or a folder of other images.  [default: 0.1, or SOURCE's own]",
)
@click.option(
    "--test",
    type=ShareOrSource(),
    help="Part of each class for evaluation, or a folder of other images.  [default: 0.2, or SOURCE's own]",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KIND=NAME",
    help="Column of a table that is the file, the label or the split; repeatable.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where a table's files lie.  [default: beside it]",
)
@click.option(
    "--class-level",
    type=click.IntRange(1),
    help="Which level of folders is the classes', 1 for the topmost.  [default: as they look]",
)
@click.option("--append", is_flag=True, help="Add the images of SOURCE to the pool of OUT; classes are not read.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the splits.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Threads that decode; worth it for large images.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output.")
def command(
    source: Path, out: Path, name: str | None, unlabelled: tuple[Path, ...], validation: float | Path | None,
    test: float | Path | None, columns: tuple[str, ...], images: Path | None, class_level: int | None, append: bool,
    seed: int, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Turn SOURCE, a person's own images, into the data folder OUT.

    SOURCE is a folder whose sub-folders are the classes, or train, val and test with the classes in them; an archive of
    such a folder (.tar, .tar.gz, .zip) or a WebDataset; a table of file and label (.csv, .tsv, .jsonl, .parquet); or a
    Hugging Face data set on disk. What lies in a sub-folder `unlabelled` is the pool. OUT gets Parquet files, a
    manifest.yaml, and left_out.csv with what was not used and why.
    """
    named = _columns(columns)
    pool = [Source(path, "unlabelled", named, images) for path in (*unlabelled, *([source] if append else []))]
    if append:
        _append(pool, out, workers, as_json)
        return
    held_out: dict[SplitName, float | Path | None] = {"validation": validation, "test": test}
    sources = [Source(source, None, named, images, class_level)]
    sources += [
        Source(path, split, named, images, class_level) for split, path in held_out.items() if isinstance(path, Path)
    ]
    shares = {split: None if isinstance(value, Path) else value for split, value in held_out.items()}
    settings = ImportSettings(shares["validation"], shares["test"], seed)
    imported = import_images([*sources, *pool], out, name=name, settings=settings, workers=workers)
    tell(imported, out)
    if as_json:
        result = {"manifest": str(out / "manifest.yaml"), "name": imported.manifest.name} | as_result(imported)
        click.echo(json.dumps(result, ensure_ascii=False))


def _columns(columns: tuple[str, ...]) -> dict[str, str]:
    named = dict(text.partition("=")[::2] for text in columns)
    if wrong := [
        text for text in columns if text.partition("=")[0] not in ("file", "label", "split") or "=" not in text
    ]:
        raise UsageError(f"--column {wrong[0]}: expected file=NAME, label=NAME or split=NAME")
    return named


def _append(sources: list[Source], out: Path, workers: int, as_json: bool) -> None:
    added, left_out = append_images(sources, out, workers=workers)
    say(f"{added + len(left_out):,} files found: {added:,} added to the pool of {out}")
    _say_left_out(left_out, out)
    if as_json:
        result = {"added": added, "left_out": [entry._asdict() for entry in left_out]}
        click.echo(json.dumps(result, ensure_ascii=False))


def as_result(imported: Imported) -> dict[str, Any]:
    """For --json."""
    return {
        "classes": imported.manifest.class_names,
        "counts": imported.counts,
        "per_class": imported.per_class,
        "left_out": [entry._asdict() for entry in imported.left_out],
    }


def tell(imported: Imported, out: Path | None = None) -> None:
    """Found, used and left out, class by class; `out` None: nothing was written.

    The number of files found is that of images used and entries left out.
    """
    used = sum(imported.counts.values())
    say(f"{used + len(imported.left_out):,} files found: {used:,} used")
    for split, count in imported.counts.items():
        say(f"  {split}: {count:,} images{_per_class(imported.per_class.get(split))}")
    _say_left_out(imported.left_out, out)
    _say_cut(imported)
    if "unlabelled" not in imported.counts:
        say("There is no pool: put images into a sub-folder `unlabelled`, or give --unlabelled.")
    if out is not None:
        say(f"Use it with: mpl pretrain --data {out}")


def _per_class(counts: dict[str, int] | None) -> str:
    if counts is None:
        return ""
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:SHOWN]]
    return f" ({', '.join(shown)}{f', … {len(counts) - SHOWN:,} more classes' if len(counts) > SHOWN else ''})"


def _say_left_out(left_out: Sequence[LeftOut], out: Path | None) -> None:
    where = "" if out is None else f"; all in {out / LEFT_OUT}"
    for reason, count in Counter(entry.reason for entry in left_out).items():
        example = next(entry for entry in left_out if entry.reason == reason)
        say(f"  left out, {reason}: {count:,} (such as {example.key}: {example.detail}){where}")


def _say_cut(imported: Imported) -> None:
    """What the import set aside of few labels, and how not to."""
    cut = sum(imported.cut.values())
    left = imported.counts["labelled"]
    if cut and cut + left < FEW:
        aside = " and ".join(f"{count:,} for {split}" for split, count in imported.cut.items() if count)
        say(
            f"Of {cut + left:,} labelled images {aside} were set aside; {left:,} are left to train on. To train on all "
            "of them, give other labelled images with --test FOLDER (and --validation FOLDER), or go without: "
            "--validation 0 --test 0"
        )
