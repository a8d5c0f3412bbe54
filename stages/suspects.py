"""`mpl suspects`: labelled images whose label is likely wrong, as a table and a page."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from pipeline.data.decoded import Images
from pipeline.errors import RunError, UsageError, UserError
from pipeline.labelling.suspects import Suspect, distances, label_margins, rank, twins_across_classes
from pipeline.networks.loading import load_network
from pipeline.networks.network import to_device
from pipeline.report.labelling.page import Card, LabellingPage
from pipeline.report.page.pictures import LARGEST, take_pictures
from pipeline.storage.files import write_text
from stages.evaluate import last_student
from stages.options import Context, stage_options
from stages.report import splits_of
from stages.students import trained
from stages.teachers import class_names, teacher_of

TABLE, PAGE, ANSWERS = "suspects.csv", "suspects.html", "labels.csv"
HEAD = ("rank", "shard", "row", "key", "label", "suggested", "margin", "reasons")


@dataclass(frozen=True, eq=False)
class Opinion:
    """What somebody says of the labelled images, (n, C), rows of NaN where nothing; and who."""

    who: str
    distributions: NDArray[np.floating[Any]]


@click.command()
@stage_options
@click.option("--n", "count", type=click.IntRange(1),
              help="Images in the page, at most. [default: 5% of the labelled, at least 20]")  # fmt: skip
def command(context: Context, count: int | None) -> None:
    """Show labelled images whose label is likely wrong.

    By what the teacher says of images that it was not trained on (pretrain.folds, or answers of a teacher of your own),
    by a student that has seen no label, by copies in another class, and by lying far from all others. Nothing is
    changed: the page saves a table of the labels that you choose.

    Reads: labelled images, teacher, student. Writes: suspects.csv (all of them) and suspects.html (the first).
    """
    if context.run.description is None:
        raise RunError(f"there is no run at {context.run.root}; begin one with: mpl pretrain --run {context.run.root}")
    if context.dry_run:
        context.console.note(f"suspects: would write {context.run / TABLE} and {context.run / PAGE}")
        return
    result = work(context, count)
    for line in result["about"]:
        context.console.note(line)
    context.console.note(
        f"suspects: {result['suspects']:,} of {result['images']:,} labelled images; {context.run / PAGE} shows "
        f"{result['shown']:,}"
    )
    if context.as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


def work(context: Context, count: int | None) -> dict[str, Any]:
    """Look, and write table and page."""
    split = context.data_set.split("labelled")
    images = context.data_set.images(split)
    labels = images.labels.numpy()
    about: list[str] = []
    found, features = opinions(context, images, about)
    nobody = np.full((len(labels), len(split.class_names)), np.nan)
    margins = label_margins(labels, [opinion.distributions for opinion in found] or [nobody])
    pixels = images.images.permute(0, 2, 3, 1).numpy()
    far = np.zeros(len(labels)) if features is None else distances(features)
    suspects = rank(margins, twins_across_classes(pixels, labels), far, images.keys)
    write_text(context.run / TABLE, table(suspects, images, split.class_names))
    shown = suspects[: count or max(20, round(0.05 * len(labels)))]
    page_of(context, shown, images, split.class_names, about).write(context.run / PAGE)
    return {
        "images": len(labels),
        "suspects": len(suspects),
        "shown": len(shown),
        "opinions": [opinion.who for opinion in found],
        "about": about,
        "output": [str(context.run / TABLE), str(context.run / PAGE)],
    }


def opinions(
    context: Context, images: Images, about: list[str]
) -> tuple[list[Opinion], NDArray[np.floating[Any]] | None]:
    """Held-out opinions about the labelled images, and what a network's last layer sees of them; tells what it left."""
    found: list[Opinion] = []
    features = None
    try:
        if (opinion := _of_teacher(context, images)) is not None:
            found.append(opinion)
        else:
            about.append(
                "the teacher was trained on the labelled images, and says their labels: it has no opinion here. With "
                "pretrain.folds=5 it would (mpl pretrain --force --set pretrain.folds=5)"
            )
    except UserError as error:
        about.append(f"no opinion of a teacher: {error}")
    try:
        folder = last_student(context)
        distributions, features = _asked(context, folder, images)
        if _saw_labels(context):
            about.append("the student was trained on the labelled images, and has no opinion of its own")
        else:
            found.append(Opinion("the student", distributions))
    except UserError as error:
        about.append(f"no opinion of a student: {error}")
    if found:
        about.insert(0, f"opinions of {' and '.join(opinion.who for opinion in found)}")
    return found, features


def _of_teacher(context: Context, images: Images) -> Opinion | None:
    """Of the run's teacher, where it was not trained on the images it is asked about, in the data set's classes."""
    filtered = (context.run.record("filter") or {}).get("result")
    teacher = teacher_of(context, None, assume_class_order=True, recorded=filtered)
    if teacher.saw_the_labelled_images:
        return None
    if teacher.names != class_names(context):
        raise UsageError("it has classes of its own")
    samples = list(context.data_set.split("labelled").read())
    q, places = teacher.answers("labelled", samples)
    at = {(samples[place][0], samples[place][1].row): answer for place, answer in zip(places.tolist(), q, strict=True)}
    nothing = np.full(q.shape[1], np.nan)
    rows = [at.get(identity, nothing) for identity in zip(images.shards, images.rows.tolist(), strict=True)]
    return Opinion("the teacher (held out)", np.stack(rows))


def _saw_labels(context: Context) -> bool:
    """Whether the last student learned from labelled images, by itself or among the pool's."""
    record = trained(context, None)
    if record["stage"] != "train-reduced" or context.run.record("finetune") is not None:
        return True
    settings = record["basis"]["settings"]
    data, teacher = settings.get("student_data", "auto"), settings["teacher"]
    return teacher == "none" or not (data == "pool" or (data == "auto" and teacher == "calibrator"))


def _asked(
    context: Context, folder: Path, images: Images
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """A network's distributions (n, C) of images, and what its last linear layer sees, (n, D)."""
    network = to_device(load_network(folder), context.device)
    logits, features = context.assembly.judge(images, network).features(network.model)
    return logits.softmax(dim=1).numpy(), features.numpy()


def table(suspects: list[Suspect], images: Images, names: tuple[str, ...]) -> str:
    """As CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(HEAD)
    for number, suspect in enumerate(suspects, 1):
        place = suspect.place
        writer.writerow(
            [
                number, images.shards[place], int(images.rows[place]), images.keys[place],
                names[int(images.labels[place])], names[suspect.suggested],
                "" if np.isnan(suspect.margin) else f"{suspect.margin:.4f}", "; ".join(suspect.reasons),
            ]
        )  # fmt: skip
    return text.getvalue()


def page_of(
    context: Context, suspects: list[Suspect], images: Images, names: tuple[str, ...], about: list[str]
) -> LabellingPage:
    """The page of the first suspects; chosen is the label that they have."""
    places = [("labelled", images.shards[s.place], int(images.rows[s.place])) for s in suspects]
    uris = take_pictures(((place, None) for place in places), splits_of(context), LARGEST, lambda *_: False).uris
    cards = []
    for suspect, (split, shard, row) in zip(suspects, places, strict=True):
        place = suspect.place
        label = int(images.labels[place])
        lines = [f"labelled {names[label]}"]
        if not np.isnan(suspect.margin) and suspect.suggested != label:
            lines.append(f"rather {names[suspect.suggested]} (margin {suspect.margin:+.2f})")
        cards.append(
            Card(shard, row, images.keys[place], uris.get((split, shard, row)), label, (*lines, *suspect.reasons))
        )
    return LabellingPage(
        title=f"{context.data_set.manifest.name}: labels to look at",
        about=f"{'. '.join(about)}. The most suspicious first. The label that an image has is chosen; choose another "
        "where it is wrong, or leave the image out.",
        class_names=names,
        cards=cards,
        saves=ANSWERS,
        then=f"then: mpl data label {context.data or 'DATA'} {ANSWERS} NEW-DATA",
    )
