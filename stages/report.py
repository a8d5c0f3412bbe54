"""`mpl report`: a run → report.html."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.data.manifest import SPLITS
from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError, RunError
from pipeline.report.page.render import gather, write_page
from pipeline.storage.runs import Run
from stages.options import Context, Options, make_context
from stages.status import stage_names, stage_status


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/default"), envvar="MPL_RUN",
              show_default=True, show_envvar=True, help="Run directory.")  # fmt: skip
@click.option("--data", envvar="MPL_DATA", show_envvar=True, metavar="DIR|URL", help="Data folder.")
@click.option("--images", type=click.IntRange(min=0), help="Kept images shown for each class. [default: 24, fewer for "
              "more than 50 classes]")  # fmt: skip
@click.option("--shards", type=click.IntRange(min=1), default=64, show_default=True,
              help="Shards of the pool that are looked into for examples, at most.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: report.html in the run]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(run: Path, data: str | None, images: int | None, shards: int, output: Path | None, as_json: bool) -> None:
    """Make one self-contained page of a run: what was kept, what just missed the line, copies beside their match.

    Reads: the run, and the pool for pictures. Writes: report.html.
    """
    if Run(run).description is None:
        raise RunError(f"there is no run at {run}; begin one with: mpl pretrain --run {run}")
    context = make_context(Options(run, data=data))
    rows = [stage_status(context.run, name) for name in stage_names(context.run)]
    report = gather(context.run, context.store, rows, splits_of(context), images=images, most_shards=shards)
    path = output or context.run / "report.html"
    result: dict[str, Any] = {
        "output": str(path),
        "bytes": write_page(report, path),
        "classes": len(report.filter.classes) if report.filter else 0,
        "pictures": len(report.filter.pictures.uris) if report.filter else 0,
        "notes": list(report.notes),
    }
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    for note in report.notes:
        context.console.note(note)
    context.console.note(f"{path}: {result['bytes'] / 2**20:.1f} MiB, {result['pictures']:,} pictures")


def splits_of(context: Context) -> Callable[[str], Mapping[str, Shard]]:
    """Opens a split of the run's data set: its shards by name."""

    def shards(name: str) -> Mapping[str, Shard]:
        split = next((known for known in SPLITS if known == name), None)
        if split is None:
            raise DataError(f"there is no {name!r} split")
        return {shard.name: shard for shard in context.data_set.split(split).shards}

    return shards
