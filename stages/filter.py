"""`mpl filter`: teacher + pool → scores/, selection.parquet, rejected/."""

import math
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError, UsageError
from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.classes import order_or_assumed, with_classes_of
from pipeline.networks.folders import read_description
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, to_device
from pipeline.pool.copies.index import VERSION, default_threshold
from pipeline.pool.filter import REJECTED_FOLDER, SELECTION_FILE, filter_pool
from pipeline.pool.infer import Scorer, infer_distributions
from pipeline.pool.rejected import REJECTED
from pipeline.pool.score import ScoreWork
from pipeline.pool.scores import gone_shards, not_scored, open_scored, shard_file
from pipeline.pool.selection import Rules, read_selection
from pipeline.storage.files import Location, fingerprint, remove_leftovers, sha256_file
from pipeline.storage.workers import EngineSettings
from stages.copies import calibrated, calibration_mark, copy_index, evaluation_splits, tell_copies
from stages.execution import Stage, execute
from stages.networks import architecture_option, network_folder
from stages.options import Context, assume_option, stage_options, with_changes
from stages.workers import engine_options, is_elsewhere, run_shards

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
def command(
    context: Context,
    teacher: Path | None,
    architecture: str | None,
    assume_class_order: bool,
    engine: EngineSettings,
    **rules: object,
) -> None:
    """Score the pool and keep the K most probable images of each class.

    Copies of evaluation images are removed; for every image that is dropped the reason is kept. Another K,
    assignment or threshold selects again from the same scores, without the teacher.

    Reads: teacher/ (or --teacher) and the pool. Writes: scores/, selection.parquet, rejected/.
    """
    context = with_changes(context, **{f"filter__{name}": value for name, value in rules.items()})
    if teacher is not None:
        teacher = network_folder(context, teacher, architecture)
    record = execute(context, lambda c: plan(c, teacher, engine, assume_class_order))
    if "result" in record:
        for line in class_table(record["result"]):
            context.console.note(line)


def teacher_folder(context: Context, teacher: Path | None) -> Path:
    """The teacher to use: the one given, else the one that this run's pool was scored with, else teacher/."""
    if teacher is not None:
        return teacher.resolve()
    known = context.run.record("filter")
    return context.run.place("teacher" if known is None else known["result"]["teacher"])


def plan(
    context: Context,
    teacher: Path | None = None,
    engine: EngineSettings | None = None,
    assume_class_order: bool = False,
) -> Stage:
    """Plan the stage."""
    engine = engine or EngineSettings()
    folder = teacher_folder(context, teacher)
    if folder == (context.run / "teacher").resolve():
        context.run.require("pretrain", "mpl pretrain")
    if not (folder / WEIGHTS).is_file():
        load_network(folder)  # for its message
    names, teacher_is = context.data_set.split("labelled").class_names, read_description(folder)
    digest, outputs = sha256_file(folder / WEIGHTS), teacher_is.arguments["num_classes"]
    known = (context.run.record("filter") or {}).get("result", {})
    if known.get("teacher_sha256") == digest:
        assume_class_order |= known.get("assumed_class_order", False)  # it was said before
    order = order_or_assumed(teacher_is.class_names, outputs, names, f"teacher {folder}", assume_class_order)
    if order != list(range(len(names))):
        context.console.note(f"teacher {folder} has the data set's classes in another order; they are matched by name")
        basis_classes = {"classes": order}
    else:
        basis_classes = {}
    settings = context.recipe.filter
    copies = settings.copies.enabled and bool(evaluation_splits(context))
    basis = {
        "teacher": digest,
        "preprocessing": teacher_is.preprocessing(),
        "pool": context.data_set.split("unlabelled").fingerprint(),
        "evaluation": [VERSION, *(split.fingerprint() for split in evaluation_splits(context))] if copies else [],
        "precision": context.precision,
        "rules": asdict(rules(context)),
        "calibration": calibration_mark(context) if copies else None,
        "rejected_format": REJECTED.version,
        **basis_classes,
    }
    return Stage(
        name="filter",
        basis=basis,
        outputs=[context.store / SELECTION_FILE, context.store / "scores"],
        work=lambda: work(context, folder, basis, engine, assume_class_order),
        summary=summary,
        replaces=[context.store / name for name in (SELECTION_FILE, "scores", REJECTED_FOLDER)],
        ready=lambda: load_teacher(context, folder, engine, assume_class_order),
        trouble=lambda result: selection_trouble(context.store, result) or _scores_trouble(context, result),
        cheap=frozenset(basis) - SCORED_BY,  # only shards that are new or changed are scored again
    )


def selection_trouble(store: Location, result: dict[str, Any]) -> str:
    """Why the selection in a store is not the one that a record of `filter` is of; empty if it is."""
    try:
        if read_selection(store / SELECTION_FILE).fingerprint != result["fingerprint"]:
            return f"{store / SELECTION_FILE} is another selection than this run made"
    except DataError as error:
        return str(error)
    return ""


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


def work(
    context: Context, folder: Path, basis: dict[str, Any], engine: EngineSettings, assume_class_order: bool = False
) -> dict[str, Any]:
    """Score every shard that is not scored yet, then select."""
    shards = context.data_set.split("unlabelled").shards
    scores = context.store / "scores"
    remove_leftovers(context.store, scores, context.store / REJECTED_FOLDER)
    if gone := gone_shards(shards, scores):
        raise DataError(
            f"{len(gone):,} shards that were scored are no longer in the pool ({', '.join(gone[:3])}"
            f"{', …' if len(gone) > 3 else ''}). Bring them back; or, if they are meant to be gone, remove their "
            f"scores ({shard_file(scores, gone[0])})"
        )
    mark = fingerprint({key: value for key, value in basis.items() if key in SCORED_BY})
    left = not_scored(shards, scores, mark)
    scoring = None
    if left:
        if len(left) < len(shards):
            context.console.note(f"{len(shards) - len(left):,} of {len(shards):,} shards are scored already")
        device_of(context, engine)  # before anything takes time
        network = load_teacher(context, folder, engine, assume_class_order)
        if folder != (context.run / "teacher").resolve():
            tell_accuracy(context, scorer(context, network))
        copies = copy_index(context, folder)
        scorer_of_all = ScoreWork(scorer(context, network, engine), scores, mark, copies)
        scoring = _score(context, left, scorer_of_all, engine)
        remove_leftovers(scores)  # of workers that died
    selecting, calibration = rules(context), calibrated(context, folder, basis["calibration"])
    if calibration is not None:
        mark_of = fingerprint([basis["calibration"], calibration.threshold])
        selecting = replace(selecting, copy_threshold=calibration.threshold, copy_calibration=mark_of)
    filtered = filter_pool(open_scored(shards, scores, mark), context.store, selecting, calibration)
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
        "teacher": context.run.told(folder),
        "teacher_sha256": basis["teacher"],
        "assumed_class_order": assume_class_order,
        "k": context.recipe.filter.k,
        "scores_fingerprint": mark,
        "scoring": scoring,
        "left_out": dict(Counter(entry.reason for entry in left_out)),
        **asdict(filtered),
    }


def tell_accuracy(context: Context, teacher: Scorer) -> None:
    """How a teacher that was trained elsewhere does on the labelled images: a wrong size, scale or order shows."""
    split = context.data_set.split("labelled")
    samples = [sample for _, sample in split.read()]
    p, places = infer_distributions(samples, teacher)
    if not len(places):
        return
    labels = np.array([samples[place].label for place in places])
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


def scorer(
    context: Context, network: Network, engine: EngineSettings | None = None, batch: int | None = None
) -> Scorer:
    """The teacher as the pool's scorer: here on its device, for workers elsewhere on the CPU until it gets there."""
    return Scorer.of(
        network,
        batch=batch or context.recipe.filter.batch,
        device=device_of(context, engine),
        precision={"float32": "float32", "bf16": "bfloat16"}[context.precision],
    )


def device_of(context: Context, engine: EngineSettings | None) -> str:
    """Where the network runs: for Ray what its tasks reserve, whatever this machine has.

    Raises:
        UsageError: `--device` contradicts `--gpus-per-worker`.
    """
    if engine is None or engine.kind != "ray":
        return str(context.device)
    device = "cuda" if engine.gpus else "cpu"
    if context.device_name not in ("auto", device):
        raise UsageError(
            f"--device {context.device_name} with --engine ray and --gpus-per-worker {engine.gpus:g}: Ray gives each "
            f"task what it reserves, so the device is {device}; leave --device out, or change --gpus-per-worker"
        )
    return device


def load_teacher(
    context: Context, folder: Path, engine: EngineSettings | None = None, assume_class_order: bool = True
) -> Network:
    """The teacher, on its device unless workers will bring it there, with the data set's classes in their order.

    That a teacher names no classes is `mpl filter`'s to ask; what comes after takes the same one.
    """
    device = torch.device("cpu") if engine is not None and is_elsewhere(engine) else context.device
    names = context.data_set.split("labelled").class_names
    network = with_classes_of(load_network(folder), names, f"teacher {folder}", assume_class_order)
    to_device(network, device)
    network.model.eval()
    return network
