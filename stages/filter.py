"""`mpl filter`: teacher + pool → scores/, selection.parquet, rejected/."""

import json
import math
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from pipeline.answers.forms import FORMS
from pipeline.answers.store import FOLDER as ANSWERS_FOLDER
from pipeline.config import CorrectionKind
from pipeline.correction import CORRECTION_FILE, Correction, Fit
from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.pool.copies.index import VERSION, default_threshold
from pipeline.pool.filter import REJECTED_FOLDER, SELECTION_FILE, filter_pool
from pipeline.pool.rejected import REJECTED
from pipeline.pool.score import ScoreWork
from pipeline.pool.scores import gone_shards, not_scored, open_scored, shard_file
from pipeline.pool.selection import Rules, read_selection
from pipeline.storage.files import Location, discard, fingerprint, remove_leftovers
from pipeline.storage.workers import EngineSettings
from stages.copies import calibrated, calibration_mark, copy_index, evaluation_splits, tell_copies
from stages.execution import Stage, execute
from stages.networks import architecture_option, network_folder
from stages.options import Context, assume_option, stage_options, with_changes
from stages.teachers import (
    NetworkTeacher,
    PredictionsTeacher,
    Teacher,
    class_map,
    class_names,
    correction_of,
    require_evidence,
    teacher_of,
    tell_fit,
)
from stages.workers import engine_options, run_shards

SHOWN = 20  # classes in the table at the end
SCORED_BY = {
    "teacher",
    "preprocessing",
    "classes",
    "evaluation",
    "precision",
}  # keys of the basis that scores depend on, the shard's content apart


@click.command()
@stage_options
@engine_options
@click.option("--k", type=int, help="Images to keep for each class.")
@click.option("--assign", type=click.Choice(["any", "argmax"]), help="any: an image may serve several classes.")
@click.option("--min-probability", type=float, help="Least probability that the teacher must give the class.")
@click.option("--upsample/--no-upsample", default=None, help="Classes short of K get a repeat count.")
@click.option(
    "--keep-copies/--remove-copies",
    "copies__keep",
    default=None,
    help="Count copies of evaluation images, but leave them in the pool.",
)
@assume_option
@click.option("--teacher", type=click.Path(path_type=Path),
              help="A teacher of your own: a folder (timm, transformers) or a file of weights. "
                   "[default: the run's teacher/]")  # fmt: skip
@architecture_option
@click.option("--predictions", multiple=True, metavar="FILE|GLOB|URL",
              help="Answers that are there already (Parquet, CSV, JSON lines, npz, a dataset's folder), in place of "
                   "a network; repeated, of several teachers, which are averaged.")  # fmt: skip
@click.option(
    "--as", "predictions_as", type=click.Choice(FORMS), help="What the predictions are. [default: as recognised]"
)
@click.option("--classes", "predictions_classes", metavar="FILE",
              help="Names of the predictions' classes, in order: one to a line, or a JSON list.")  # fmt: skip
@click.option("--correction", type=click.Choice(get_args(CorrectionKind)),
              help="How a teacher's own classes become yours: by a map, or fitted to labelled images (scaling: by a "
                   "few numbers).")  # fmt: skip
@click.option("--class-map", metavar="FILE", help="YAML: for each of your classes the teacher's, one or a list.")
@click.option("--seen-labels/--held-out-labels", default=None,
              help="Whether a teacher of your own was trained on the labelled images: then nothing is fitted to what "
                   "it says of them.")  # fmt: skip
def command(
    context: Context,
    teacher: Path | None,
    architecture: str | None,
    assume_class_order: bool,
    engine: EngineSettings,
    predictions: tuple[str, ...],
    **rules: object,
) -> None:
    """Score the pool and keep the K most probable images of each class.

    Copies of evaluation images are removed; for every image that is dropped the reason is kept. Another K,
    assignment or threshold selects again from the same scores, without the teacher.

    Reads: teacher/ (or --teacher, or --predictions) and the pool. Writes: scores/, selection.parquet, rejected/.
    """
    if predictions and teacher is not None:
        raise click.UsageError("--teacher is a network, --predictions are answers in its place; give one of them")
    if predictions:
        rules |= {"predictions": json.dumps(list(predictions)), "predictions_in_order": assume_class_order}
    elif teacher is not None:
        rules["predictions"] = "[]"
        teacher = network_folder(context, teacher, architecture)
    context = with_changes(context, **{f"filter__{name}": value for name, value in rules.items()})
    record = execute(context, lambda c: plan(c, teacher, engine, assume_class_order))
    if "result" in record:
        for line in class_table(record["result"]):
            context.console.note(line)


def plan(
    context: Context,
    teacher: Path | None = None,
    engine: EngineSettings | None = None,
    assume_class_order: bool = False,
) -> Stage:
    """Plan the stage."""
    engine = engine or EngineSettings()
    known = (context.run.record("filter") or {}).get("result", {})
    chosen = teacher_of(context, teacher, engine, assume_class_order)
    if isinstance(chosen, NetworkTeacher) and known.get("teacher_sha256") == chosen.digest:  # it was said before
        chosen = replace(chosen, assume_class_order=assume_class_order or known.get("assumed_class_order", False))
    basis = chosen.basis
    if "classes" in basis:
        where = f"teacher {chosen.told['teacher']}"
        context.console.note(f"{where} has the data set's classes in another order; they are matched by name")
    copies = context.recipe.filter.copies.enabled and bool(evaluation_splits(context))
    basis = {
        **basis,
        "pool": context.data_set.split("unlabelled").fingerprint(),
        "evaluation": [VERSION, *(split.fingerprint() for split in evaluation_splits(context))] if copies else [],
        "precision": context.precision,
        "rules": {name: value for name, value in asdict(rules(context)).items() if name != "correction"},
        "calibration": calibration_mark(context) if copies else None,
        "rejected_format": REJECTED.version,
        **correction_basis(context, chosen),
        **({"seen_labels": True} if context.recipe.filter.seen_labels else {}),
    }
    return Stage(
        name="filter",
        basis=basis,
        outputs=[context.store / SELECTION_FILE, context.store / "scores"],
        work=lambda: work(context, chosen, basis, engine),
        summary=summary,
        replaces=[context.store / name for name in (SELECTION_FILE, "scores", REJECTED_FOLDER, ANSWERS_FOLDER)],
        ready=chosen.check,
        trouble=lambda result: (
            selection_trouble(context.store, result) or _scores_trouble(context, result) or _answers_trouble(chosen)
        ),
        cheap=(frozenset(basis) | {"seen_labels", "correction"})
        - SCORED_BY,  # only shards that are new or changed are scored again
    )


def correction_basis(context: Context, teacher: Teacher) -> dict[str, Any]:
    """What the correction depends on beside the scores; empty where there is none."""
    settings = context.recipe.filter
    if settings.correction in ("auto", "identity") and settings.class_map is None:
        return {}
    if fitted := settings.correction in ("scaling", "fit"):
        require_evidence(teacher)
    mapped = class_map(context, teacher)
    return {
        "correction": {
            "kind": settings.correction,
            "class_map": None if mapped is None else fingerprint(mapped.tolist()),
            **({"labelled": context.data_set.split("labelled").fingerprint(), "seed": context.seed} if fitted else {}),
        }
    }


def selection_trouble(store: Location, result: dict[str, Any]) -> str:
    """Why the selection in a store is not the one that a record of `filter` is of; empty if it is."""
    try:
        if read_selection(store / SELECTION_FILE).fingerprint != result["fingerprint"]:
            return f"{store / SELECTION_FILE} is another selection than this run made"
    except DataError as error:
        return str(error)
    return ""


def _answers_trouble(teacher: Teacher) -> str:
    return teacher.trouble() if isinstance(teacher, PredictionsTeacher) else ""


def _scores_trouble(context: Context, result: dict[str, Any]) -> str:
    shards = context.data_set.split("unlabelled").shards
    left = not_scored(shards, context.store / "scores", result["scores_fingerprint"])
    return f"the scores of {len(left):,} shards are missing or damaged ({left[0].name}, …)" if left else ""


def rules(context: Context) -> Rules:
    """What is kept, from the recipe."""
    settings = context.recipe.filter
    threshold = settings.copies.threshold
    if threshold is None:
        threshold = default_threshold(context.recipe.data.image_size)
    return Rules(
        k=settings.k,
        assign=settings.assign,
        min_probability=settings.min_probability,
        copy_threshold=threshold if settings.copies.enabled else None,
        upsample=settings.upsample,
        keep_copies=settings.copies.keep,
    )


def summary(result: dict[str, Any]) -> str:
    """The outcome for a person, with what fell short."""
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in result["rejected"].items()) or "none"
    text = f"{result['kept']:,} of {result['images']:,} images kept; rejected: {rejected}"
    short = [c for c in result["classes"] if c["short"]]
    if short:
        empty = [c["name"] for c in short if not c["kept"]]
        text += (
            f". Fewer than K = {result['k']:,} are available for {len(short)} of {len(result['classes'])} classes "
            f"(fewest: {min(c['kept'] for c in short):,}); all that there are were kept"
        )
        if empty:
            text += f". Without any image: {', '.join(empty)}"
    return text


def class_table(result: dict[str, Any]) -> list[str]:
    """Available, kept, short and threshold of each class, as lines; of many classes those that are most short."""
    classes = result["classes"]
    shown = sorted(classes, key=lambda c: -c["short"])[:SHOWN] if len(classes) > SHOWN else classes
    width = max(5, *(len(c["name"]) for c in shown))
    lines = [f"{'class':<{width}}  {'available':>11}  {'kept':>9}  {'short':>9}  threshold"]
    for c in shown:
        p = None if c["threshold"] is None else 1 / (1 + math.exp(-max(-700.0, c["threshold"])))
        least = "–" if p is None else f"{p:.4f}"
        lines.append(f"{c['name']:<{width}}  {c['available']:>11,}  {c['kept']:>9,}  {c['short']:>9,}  {least:>9}")
    if len(shown) < len(classes):
        lines.append(f"… and {len(classes) - len(shown):,} classes that are less short; record.json has all")
    return lines


def work(context: Context, teacher: Teacher, basis: dict[str, Any], engine: EngineSettings) -> dict[str, Any]:
    """Score every shard that is not scored yet, then select."""
    shards = context.data_set.split("unlabelled").shards
    scores = context.store / "scores"
    remove_leftovers(context.store, scores, context.store / REJECTED_FOLDER, context.store / ANSWERS_FOLDER)
    if gone := gone_shards(shards, scores):
        raise DataError(
            f"{len(gone):,} shards that were scored are no longer in the pool ({', '.join(gone[:3])}"
            f"{', …' if len(gone) > 3 else ''}). Bring them back; or, if they are meant to be gone, remove their "
            f"scores ({shard_file(scores, gone[0])})"
        )
    mark = fingerprint({key: value for key, value in basis.items() if key in SCORED_BY})
    left = not_scored(shards, scores, mark)
    scoring = None
    if left or "correction" in basis or isinstance(teacher, PredictionsTeacher):
        teacher.begin()
    if left:
        if len(left) < len(shards):
            context.console.note(f"{len(shards) - len(left):,} of {len(shards):,} shards are scored already")
        if not (isinstance(teacher, NetworkTeacher) and teacher.is_own):
            tell_accuracy(context, teacher)
        copies = copy_index(context, teacher.compared)
        scorer_of_all = ScoreWork(teacher.source(engine), scores, mark, copies)
        scoring = _score(context, left, scorer_of_all, engine)
        remove_leftovers(scores)  # of workers that died
    selecting, calibration = rules(context), calibrated(context, teacher.compared, basis["calibration"])
    if calibration is not None:
        mark_of = fingerprint([basis["calibration"], calibration.threshold])
        selecting = replace(selecting, copy_threshold=calibration.threshold, copy_calibration=mark_of)
    correction = _correction(context, teacher)
    selecting = replace(selecting, correction=correction.fingerprint())
    filtered = filter_pool(open_scored(shards, scores, mark), context.store, selecting, calibration, correction)
    tell_copies(context, filtered, selecting.copy_threshold if basis["evaluation"] else None, calibration)
    left_out = [entry for _, entry in context.data_set.split("unlabelled").left_out()]
    if left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(e.reason for e in left_out).items())
        context.console.note(
            f"{filtered.images + len(left_out):,} files found: {filtered.images:,} in the pool; not in it: {reasons} "
            f"(such as {left_out[0].key}: {left_out[0].detail})"
        )
    if filtered.repeated_keys:
        context.console.note(f"{filtered.repeated_keys:,} images have a key that an earlier image has (harmless)")
    return {
        **teacher.told,
        "teacher_sha256": basis["teacher"],
        "k": context.recipe.filter.k,
        "scores_fingerprint": mark,
        "scoring": scoring,
        "left_out": dict(Counter(entry.reason for entry in left_out)),
        **({} if correction.kind == "identity" else {"correction": correction.fingerprint()}),
        **({"answers": teacher.counts} if isinstance(teacher, PredictionsTeacher) else {}),
        **asdict(filtered),
    }


def _correction(context: Context, teacher: Teacher) -> Correction:
    """Made, told, and kept beside the selection."""
    found = correction_of(context, teacher)
    if isinstance(found, Fit):
        tell_fit(context, found)
        found = found.correction
    if found.kind == "identity":
        discard(context.store / CORRECTION_FILE)
    else:
        found.save(context.store / CORRECTION_FILE)
    return found


def tell_accuracy(context: Context, teacher: Teacher) -> None:
    """How a teacher that was trained elsewhere does on the labelled images: a wrong size, scale or order shows."""
    if teacher.names != class_names(context):
        return
    samples = list(context.data_set.split("labelled").read())
    p, places = teacher.answers("labelled", samples)
    if not len(places):
        return
    labels = np.array([samples[place][1].label for place in places])
    right = int((p.argmax(axis=1) == labels).sum())
    majority = int(np.bincount(labels).max())
    doubt = (
        f"naming the most frequent class for all would be right about {majority:,}; the size, mean and std of its "
        "config.json, or the order of its classes, may be wrong"
    )
    context.console.note(
        f"the teacher is right about {right:,} of the {len(labels):,} labelled images"
        + ("" if right > majority else f". WARNING: {doubt}")
    )


def _score(context: Context, shards: list[Shard], work: ScoreWork, engine: EngineSettings) -> dict[str, float]:
    """Score `shards`, one file each; images a second, and the share of time in which the network waited."""
    began = time.monotonic()
    counts = run_shards(
        context,
        engine,
        work,
        shards,
        name=lambda shard: shard.name,
        images=lambda count: count.rows,
    )
    images, seconds = sum(count.rows for count in counts), time.monotonic() - began
    busy, waiting = sum(count.seconds for count in counts), sum(count.waiting for count in counts)
    figures = {
        "images": images,
        "images_per_second": round(images / seconds, 1),
        "waiting_share": round(waiting / max(busy, 1e-9), 3),
    }
    context.console.note(
        f"scored {images:,} images, {figures['images_per_second']:,.0f} a second; "
        f"{100 * figures['waiting_share']:.0f}% of the time the network waited for images"
    )
    return figures
