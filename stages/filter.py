"""`mpl filter`: teacher + pool → scores/, selection.parquet, rejected/."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options, with_changes

if TYPE_CHECKING:
    from pipeline.data.shards import Shard
    from pipeline.models import Network
    from pipeline.pool.copies import CopyIndex
    from pipeline.pool.filter import Rules
    from stages.execution import Stage


@click.command()
@stage_options
@click.option("--k", type=int, help="Images to keep for each class.")
@click.option("--assign", type=click.Choice(["any", "argmax"]), help="any: an image may serve several classes.")
@click.option("--min-probability", type=float, help="Least probability that the teacher must give the class.")
@click.option("--upsample/--no-upsample", default=None, help="Classes short of K get a repeat count.")
@click.option("--teacher", type=click.Path(path_type=Path, file_okay=False),
              help="A teacher of your own: a folder in timm's layout. [default: the run's teacher/]")  # fmt: skip
def command(
    context: Context,
    k: int | None,
    assign: str | None,
    min_probability: float | None,
    upsample: bool | None,
    teacher: Path | None,
) -> None:
    """Score the pool and keep the K most probable images of each class.

    Copies of evaluation images are removed; for every image that is dropped the reason is kept. Another K,
    assignment or threshold selects again from the same scores, without the teacher.

    Reads: teacher/ (or --teacher) and the pool. Writes: scores/, selection.parquet, rejected/.
    """
    from stages.execution import execute

    context = with_changes(
        context,
        filter__k=k,
        filter__assign=assign,
        filter__min_probability=min_probability,
        filter__upsample=upsample,
    )
    execute(context, lambda c: plan(c, teacher))


def teacher_folder(context: Context, teacher: Path | None) -> Path:
    """The teacher to use: the one given, else the one that this run's pool was scored with, else teacher/."""
    if teacher is not None:
        return teacher.resolve()
    known = context.run.record("filter")
    return Path(known["result"]["teacher"]) if known is not None else (context.run / "teacher").resolve()


def plan(context: Context, teacher: Path | None = None) -> "Stage":
    """Plan the stage."""
    from pipeline.files import sha256_file
    from pipeline.models import WEIGHTS
    from stages.execution import Stage
    from stages.learning import split_of

    folder = teacher_folder(context, teacher)
    if folder == (context.run / "teacher").resolve():
        context.run.require("pretrain", "mpl pretrain")
    if not (folder / WEIGHTS).is_file():
        from pipeline.models import load_network

        load_network(folder)  # for its message
    settings = context.recipe.filter
    copies = settings.copies.enabled
    basis = {
        "teacher": sha256_file(folder / WEIGHTS),
        "pool": split_of(context, "unlabelled").fingerprint(),
        "evaluation": [split_of(context, name).fingerprint() for name in evaluation_splits(context)] if copies else [],
        "precision": context.precision,
        "rules": asdict(rules(context)),
    }
    return Stage(
        name="filter",
        basis=basis,
        outputs=[context.run / "selection.parquet", context.run / "scores"],
        work=lambda: work(context, folder, basis),
        summary=summary,
        replaces=["selection.parquet", "scores", "rejected"],
        cheap=frozenset({"rules"}),
    )


def evaluation_splits(context: Context) -> "list[Any]":
    """The splits whose copies must not be in the pool."""
    from stages.learning import manifest_of

    return [name for name in ("validation", "test") if name in manifest_of(context).splits]


def rules(context: Context) -> "Rules":
    """What is kept, from the recipe."""
    from pipeline.pool.copies import default_threshold
    from pipeline.pool.filter import Rules

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


def work(context: Context, folder: Path, basis: dict[str, Any]) -> dict[str, Any]:
    """Score every shard that is not scored yet, then select."""
    from pipeline.files import fingerprint
    from pipeline.pool.filter import filter_pool
    from pipeline.pool.score import is_scored
    from pipeline.pool.scored import open_scored
    from stages.learning import split_of

    shards = split_of(context, "unlabelled").shards
    scores = context.run / "scores"
    mark = fingerprint({key: value for key, value in basis.items() if key not in ("rules", "pool")})
    left = [shard for shard in shards if not is_scored(shard, scores, mark)]
    if left:
        network, copies = load_teacher(context, folder), copy_index(context, folder)
        _score(context, left, network, copies, scores, mark)
    filtered = filter_pool(open_scored(shards, scores, mark), context.run.root, rules(context))
    if filtered.repeated_keys:
        context.console.note(f"{filtered.repeated_keys:,} images have a key that an earlier image has (harmless)")
    return {
        "teacher": str(folder),
        "teacher_sha256": basis["teacher"],
        "k": context.recipe.filter.k,
        "scores_fingerprint": mark,
        **asdict(filtered),
    }


def _score(
    context: Context,
    shards: "list[Shard]",
    network: "Network",
    copies: "CopyIndex | None",
    scores: Path,
    mark: str,
) -> None:
    """Score `shards`, one file each."""
    from pipeline.pool.score import score_shard

    total, done = sum(shard.rows() for shard in shards), 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        context.console.progress(done, total, {})
        if context.console.stop_requested():
            raise KeyboardInterrupt("shards that are scored stay")

    for shard in shards:
        score_shard(shard, scorer(context, network), scores, fingerprint=mark, copies=copies, progress=advance)


def scorer(context: Context, network: "Network") -> Any:
    """The teacher as the pool's scorer."""
    from pipeline.pool.infer import Scorer

    return Scorer(
        network.model,
        tuple(network.class_names),
        network.image_size,
        network.mean,
        network.std,
        batch=context.recipe.filter.batch,
        device=str(context.device),
        precision={"float32": "float32", "bf16": "bfloat16"}[context.precision],
    )


def load_teacher(context: Context, folder: Path) -> "Network":
    """The teacher on its device, with the data set's classes."""
    from dataclasses import replace

    from pipeline.models import load_network
    from stages.learning import check_classes, split_of, to_device

    network = to_device(load_network(folder), context.device)
    names = split_of(context, "labelled").class_names
    check_classes(network, names, f"teacher {folder}")
    network.model.eval()
    return replace(network, class_names=list(names))


def copy_index(context: Context, folder: Path) -> "CopyIndex | None":
    """Index of the validation and test images at the teacher's size; None where the recipe turns it off."""
    import json

    import numpy as np

    from pipeline.models import CONFIG
    from pipeline.pool.copies import CopyIndex
    from stages.learning import load_split, split_of

    if not context.recipe.filter.copies.enabled:
        return None
    size = json.loads((folder / CONFIG).read_text())["pretrained_cfg"]["input_size"][-1]
    pixels, names = [], []
    for name in evaluation_splits(context):
        images = load_split(context, split_of(context, name), size)
        pixels.append(images.images.permute(0, 2, 3, 1).numpy())
        names += [f"{name}/{shard}/{row}" for shard, row in zip(images.shards, images.rows, strict=True)]
    return CopyIndex(np.concatenate(pixels), names) if pixels else None
