"""`mpl data label`: a data set + answers of a person → a data set with these labels."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.data.get.relabel import read_answers, relabel
from stages.terminal import say


@click.command("label")
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("answers", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output.")
def command(data: Path, answers: Path, out: Path, as_json: bool) -> None:
    """Turn DATA into the data folder OUT, with the labels of ANSWERS.

    ANSWERS is the table that a page of `mpl next` or `mpl suspects` saves: shard, row, key, label. A labelled image
    gets the label, or is left out where that is empty; a pool image with a label joins the labelled ones. Validation
    and test images stay as they are, and so does DATA.
    """
    found = relabel(data, read_answers(answers), out)
    say(
        f"{found.changed:,} labels changed, {found.confirmed:,} confirmed, {found.left_out:,} images left out, "
        f"{found.added:,} of the pool labelled: {found.labelled:,} labelled images, {found.unlabelled:,} in the pool"
    )
    say(f"Use it with: mpl pretrain --data {out}")
    if as_json:
        click.echo(json.dumps(asdict(found)))
