"""`mpl next`: the pool images whose labels would tell most, as a table and a page to label them on."""

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.decode import decode_stream, default_workers
from pipeline.errors import RunError, UsageError, UserError
from pipeline.evaluate import predict_logits
from pipeline.labelling.informative import choose, disagreement, like_the_labelled, shortness
from pipeline.log_odds import distributions
from pipeline.networks.features import last_layer_seen
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, to_device
from pipeline.pool.rejected import REJECTED
from pipeline.pool.scores import read_scores, read_shard_scores, shard_file
from pipeline.report.labelling.page import Card, LabellingPage
from pipeline.report.page.pictures import LARGEST, take_pictures
from pipeline.storage.files import write_text
from pipeline.storage.tables import open_table
from stages.evaluate import last_student
from stages.options import Context, stage_options
from stages.precompute import selected_correction
from stages.report import splits_of

TABLE, PAGE, ANSWERS = "next.csv", "next.html", "labels.csv"
HEAD = ("shard", "row", "key", "student", "probability", "teacher", "disagreement")
ROWS = 65_536  # of a table that are read at a time
MOST = 50_000  # pool images that are looked at


class Candidate(NamedTuple):
    """A pool image."""

    shard: str
    row: int
    key: str


Seen = tuple[list[Candidate], NDArray[np.float32], NDArray[np.float32]]  # images, (n, C), (n, D)


@click.command()
@stage_options
@click.option("--n", "count", type=click.IntRange(1), default=50, show_default=True, help="Images to choose.")
@click.option("--most", type=click.IntRange(1), default=MOST, show_default=True,
              help="Pool images that are looked at, drawn evenly.")  # fmt: skip
@click.option("--strange/--no-strange", default=False, show_default=True,
              help="Also images that are less like any labelled one than those are like each other.")  # fmt: skip
def command(context: Context, count: int, most: int, strange: bool) -> None:
    """Choose the pool images whose labels would tell most, and make a page to label them on.

    By the student (the run's last): unsure of them and unlike each other; more so where the teacher sees them
    otherwise, and in classes that are short of labels. What is unlike all labelled images is passed over: it is of no
    class, or of a kind that has no label yet (--strange). The page saves labels.csv; `mpl data label` takes it back.

    Reads: student, teacher, labelled images, pool. Writes: next.csv and next.html.
    """
    if context.run.description is None:
        raise RunError(f"there is no run at {context.run.root}; begin one with: mpl pretrain --run {context.run.root}")
    if "unlabelled" not in context.data_set.manifest.splits:
        raise UsageError(f"{context.data_set.manifest.name} has no pool to choose from")
    if context.dry_run:
        context.console.note(f"next: would write {context.run / TABLE} and {context.run / PAGE}")
        return
    result = work(context, count, most, strange)
    for line in result["about"]:
        context.console.note(line)
    context.console.note(
        f"next: {result['chosen']:,} of {result['images']:,} pool images; label them on {context.run / PAGE}"
    )
    if context.as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


def work(context: Context, count: int, most: int, strange: bool = False) -> dict[str, Any]:
    """Look at the pool, choose, and write table and page."""
    about: list[str] = []
    network = to_device(load_network(last_student(context)), context.device)
    candidates, p, features = look_at_pool(context, network, most)
    if not strange:
        candidates, p, features = _known_kinds(context, network, count, (candidates, p, features), about)
    labelled = context.data_set.split("labelled").labels()
    teacher = _teachers_view(context, candidates, about)
    apart = np.zeros(len(p)) if teacher is None else disagreement([p, teacher])
    short = shortness(labelled, p.shape[1])
    chosen = choose(p, features, (1 + apart) * short[p.argmax(axis=1)], count, context.seed)
    names = context.data_set.split("labelled").class_names
    write_text(context.run / TABLE, _table([candidates[i] for i in chosen], p[chosen], _of(teacher, chosen), names))
    _page(context, [candidates[i] for i in chosen], p[chosen], _of(teacher, chosen), names).write(context.run / PAGE)
    return {
        "images": len(candidates),
        "chosen": len(chosen),
        "about": about,
        "output": [str(context.run / TABLE), str(context.run / PAGE)],
    }


def _of(rows: NDArray[Any] | None, chosen: NDArray[np.int64]) -> NDArray[Any] | None:
    return None if rows is None else rows[chosen]


def _known_kinds(context: Context, network: Network, count: int, seen: Seen, about: list[str]) -> Seen:
    """Without the images that are unlike all labelled ones, where enough are left to choose from."""
    images = context.data_set.images(context.data_set.split("labelled"), network.image_size, network.framing)
    _, labelled = context.assembly.judge(images, network).features(network.model)
    candidates, p, features = seen
    known = like_the_labelled(features, labelled.numpy())
    text = f"{len(known) - int(known.sum()):,} images are less like any labelled one than those are like each other"
    if known.sum() < count:
        about.append(f"{text}; too few are left, so they are among those to choose from")
        return seen
    about.append(f"{text}: of no class, or of a kind without a label. They are passed over; --strange has them too")
    places = np.flatnonzero(known)
    return [candidates[place] for place in places.tolist()], p[places], features[places]


def look_at_pool(context: Context, network: Network, most: int) -> Seen:
    """Images that decode, the student's distributions (n, C) of them, and what its last layer sees, (n, D)."""
    split = context.data_set.split("unlabelled")
    every = max(1, -(-split.count() // most))
    aside = {shard.name: _set_aside(context, shard.name) for shard in split.shards}
    every_so_many = (item for number, item in enumerate(split.read()) if number % every == 0)
    stream = ((shard, sample) for shard, sample in every_so_many if sample.row not in aside[shard])
    candidates: list[Candidate] = []
    p: list[NDArray[np.float32]] = []
    features: list[NDArray[np.float32]] = []
    total = -(-split.count() // every)
    decoded = _decoded(stream, network)
    while batch := list(islice(decoded, context.recipe.evaluate.batch)):
        pixels = torch.from_numpy(np.stack([image for _, image in batch])).permute(0, 3, 1, 2)
        with last_layer_seen(network.model) as seen:
            logits = predict_logits(
                network.model, pixels, network.mean, network.std, batch=len(batch), device=context.device,
                autocast=context.placement.autocast,
            )  # fmt: skip
        candidates += [candidate for candidate, _ in batch]
        p.append(logits.softmax(dim=1).numpy())
        features.append(torch.cat(seen).numpy())
        context.console.progress(len(candidates), total, {}, "images")
        if context.console.stop_requested():
            raise KeyboardInterrupt
    if not candidates:
        raise RunError(f"no pool image of {context.data_set.manifest.name} decodes")
    return candidates, np.concatenate(p), np.concatenate(features)


def _decoded(stream: Iterator[Any], network: Network) -> Iterator[tuple[Candidate, NDArray[np.uint8]]]:
    for (shard, sample), image, _, _ in decode_stream(
        stream, network.image_size, default_workers(network.image_size), data_of=lambda item: item[1].data,
        framing=network.framing,
    ):  # fmt: skip
        if image is not None:
            yield Candidate(shard, sample.row, sample.key), image


def _teachers_view(context: Context, candidates: list[Candidate], about: list[str]) -> NDArray[np.float64] | None:
    """The teacher's distributions (n, C) of the candidates, from its scores; None where one is missing."""
    filtered = (context.run.record("filter") or {}).get("result")
    if filtered is None:
        about.append("the pool was not scored (mpl filter): the student's view alone")
        return None
    correction = selected_correction(context, filtered)
    wanted: dict[str, list[int]] = {}
    for place, candidate in enumerate(candidates):
        wanted.setdefault(candidate.shard, []).append(place)
    view: NDArray[np.float64] | None = None
    for shard, places in wanted.items():
        try:
            stored = _log_odds(context, shard, [candidates[place].row for place in places])
        except UserError as error:
            about.append(f"the student's view alone: {error}")
            return None
        if correction is not None:
            stored = correction.log_odds(stored)
        q = distributions(stored)
        view = np.full((len(candidates), q.shape[1]), np.nan) if view is None else view
        view[places] = q
    if view is None or np.isnan(view).any():
        about.append("the teacher has not answered about all of them: the student's view alone")
        return None
    return view


def _log_odds(context: Context, shard: str, rows: list[int]) -> NDArray[np.float32]:
    """The teacher's scores of rows of a shard, (m, C_T), nats; NaN where it has none."""
    scores = read_shard_scores(shard_file(context.store / "scores", shard))
    places = {row: place for place, row in enumerate(rows)}
    found = np.full((len(rows), len(scores.class_names)), np.nan, np.float32)
    for batch in read_scores(scores, ("row", "log_odds")):
        for row, value in zip(batch.column("row").to_pylist(), batch.column("log_odds").to_pylist(), strict=True):
            if value is not None and (place := places.get(row)) is not None:
                found[place] = np.frombuffer(value, "<f4")
    return found


def _set_aside(context: Context, shard: str) -> frozenset[int]:
    """Rows that `mpl filter` found to be copies of evaluation images, or repeats: nobody is asked about them."""
    path = shard_file(context.store / "rejected", shard)
    if not path.exists():
        return frozenset()
    with open_table(path, REJECTED) as table:
        return frozenset(
            row
            for batch in table.batches(["row", "reason"], ROWS)
            for row, reason in zip(batch.column("row").to_pylist(), batch.column("reason").to_pylist(), strict=True)
            if reason in ("eval_copy", "repeat_of")
        )


def _table(candidates: list[Candidate], p: NDArray[Any], teacher: NDArray[Any] | None, names: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(HEAD)
    for i, candidate in enumerate(candidates):
        best = int(p[i].argmax())
        theirs = ["", ""]
        if teacher is not None:
            theirs = [names[int(teacher[i].argmax())], f"{disagreement([p[i : i + 1], teacher[i : i + 1]])[0]:.4f}"]
        writer.writerow([*candidate, names[best], f"{p[i, best]:.4f}", *theirs])
    return text.getvalue()


def _page(
    context: Context,
    candidates: list[Candidate],
    p: NDArray[Any],
    teacher: NDArray[Any] | None,
    names: tuple[str, ...],
) -> LabellingPage:
    wanted = ((("unlabelled", candidate.shard, candidate.row), candidate.key) for candidate in candidates)
    uris = take_pictures(wanted, splits_of(context), LARGEST, lambda *_: False).uris
    cards = []
    for i, candidate in enumerate(candidates):
        best = int(p[i].argmax())
        lines = [f"student: {names[best]} ({100 * p[i, best]:.0f}%)"]
        if teacher is not None:
            theirs = int(teacher[i].argmax())
            lines.append(f"teacher: {names[theirs]} ({100 * teacher[i, theirs]:.0f}%)")
        cards.append(Card(*candidate, uris.get(("unlabelled", candidate.shard, candidate.row)), None, tuple(lines)))
    return LabellingPage(
        title=f"{context.data_set.manifest.name}: label these {len(cards):,} images next",
        about="The student is unsure of them, and they are unlike each other. Leave out what is of no class: it stays "
        "in the pool.",
        class_names=names,
        cards=cards,
        saves=ANSWERS,
        then=f"then: mpl data label {context.data or 'DATA'} {ANSWERS} NEW-DATA",
    )
