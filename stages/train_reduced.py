"""`mpl train-reduced`: targets + labelled images → student/, with the calibrator, or with a baseline's teacher."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options, with_changes
from stages.students import NAME_HELP

if TYPE_CHECKING:
    from pipeline.calibration import CalibrationLog
    from pipeline.config import Reading, Recipe
    from pipeline.data.decoded import Images
    from pipeline.student_data import LabelledSet, Pool, PoolSet
    from pipeline.targets import TargetsStore
    from pipeline.targets.stream import StreamedPool
    from pipeline.teachers import Calibrator
    from stages.execution import Stage


@click.command()
@stage_options
@click.option("--teacher", type=click.Choice(["calibrator", "fixed", "none"]),
              help="calibrator: Reduced MPL. fixed: NoisyStudent. none: Supervised.")  # fmt: skip
@click.option("--name", help=NAME_HELP)
def command(context: Context, teacher: str | None, name: str | None) -> None:
    """Train the student.

    Reads: targets/ and the labelled split. Writes: student/model.safetensors, config.json, metrics.csv,
    calibrator.safetensors, calibration.json.
    """
    from stages.execution import execute

    context = with_changes(context, train_reduced__teacher=teacher)
    execute(context, lambda c: plan(c, name))


def plan(context: Context, name: str | None = None) -> "Stage":
    """Plan the stage."""
    from pipeline.checkpoints import CHECKPOINTS
    from stages.execution import Stage
    from stages.learning import network_outputs, require_engine, split_of, training_basis
    from stages.precompute import require_fresh_targets
    from stages.students import own_student, stage_name, student_folder

    settings = context.recipe.train_reduced
    if settings.teacher == "calibrator":
        require_engine(context, settings.model, settings.feedback)
    folder = student_folder(context, name)
    labelled = split_of(context, "labelled")
    inputs: dict[str, Any] = {"labelled": labelled.fingerprint()}
    irrelevant = {"none": {"calibrator", "feedback", "student_data", "labelled_target", "labelled_share"},
                  "fixed": {"calibrator", "feedback"}, "calibrator": set()}[settings.teacher]  # fmt: skip
    irrelevant |= {"reading", "workers"}  # of the former, what it comes to is an input
    if settings.teacher != "none":
        made = require_fresh_targets(context.run)["result"]
        inputs["targets"] = made["fingerprint"]
        if reading(context.recipe, made["pool"], len(labelled.class_names)) == "stream":
            inputs["reading"] = "stream"
    basis = training_basis(context, settings, **inputs)
    basis["settings"] = {k: v for k, v in basis["settings"].items() if k not in irrelevant}
    outputs = network_outputs(folder)
    if settings.teacher == "calibrator":
        outputs.append(folder / "calibrator.safetensors")
    stage = Stage(
        name=stage_name("train-reduced", name),
        basis=basis,
        outputs=outputs,
        work=lambda: work(context, folder, basis),
        summary=lambda result: f"Student ({result['method']}): {result['validation']['top1']:.2f}% on validation",
        replaces=[folder],
        leftovers=[folder / CHECKPOINTS],
        keeps_recipe=name is None,
        together=True,
    )
    return own_student(context, stage, "train-reduced", name)


def reading(settings: "Recipe", images: int, classes: int) -> "Reading":
    """How the pool is read. The two ways have different orders, and so different results."""
    chosen, data = settings.train_reduced.reading, settings.data
    if chosen != "auto":
        return chosen
    decoded = images * (3 * data.image_size**2 + 4 * classes)  # bytes: pixels, distribution in float32
    return "memory" if decoded <= data.memory_gib * 2**30 else "stream"


def work(context: Context, folder: Path, basis: dict[str, Any]) -> dict[str, Any]:
    """Train the student under the recipe's teacher: one loop, one object exchanged."""
    from pipeline.models import build_network
    from pipeline.student_data import StudentData, mixture
    from pipeline.targets import TargetsStore
    from pipeline.teachers import Calibrator, FixedTargets
    from stages.learning import (
        load_split,
        seed_initialisation,
        split_of,
        tell_feedback_batch,
        to_device,
        train_and_save,
    )

    recipe, settings = context.recipe, context.recipe.train_reduced
    split = split_of(context, "labelled")
    store, way = None, basis.get("reading", "memory")
    if settings.teacher != "none":
        precomputed = context.run.require("precompute", "mpl precompute")["result"]
        store = TargetsStore.open(
            context.store / "targets", teacher=precomputed["teacher_sha256"], class_names=split.class_names
        )
    composition = mixture(settings, settings.teacher)
    labelled = labelled_set(load_split(context, split), store)
    pool: Pool | None = None
    if store is not None:
        made = precomputed["fingerprint"]
        pool = pool_set(context, store, made) if way == "memory" else streamed_pool(context, store)
    seed_initialisation(context, "student")  # the same initial student for every method of a seed
    network = build_network(
        settings.model, split.class_names, recipe.data.image_size, recipe.data.mean, recipe.data.std
    )
    to_device(network, context.device)
    data = StudentData(
        labelled, pool, composition, settings,
        classes=len(split.class_names), mean=recipe.data.mean, std=recipe.data.std,
        seed=context.seed, device=context.device,
        feedback_batch=settings.feedback.batch, feedback_augment=settings.feedback.augment,
        held_out=settings.feedback.held_out if settings.teacher == "calibrator" else 0.0,
        ranks=context.together,
    )  # fmt: skip
    with closing(data):
        if settings.teacher == "calibrator":
            tell_feedback_batch(context, settings.feedback.batch, data)
            seed_initialisation(context, "calibrator")
            calibrator = Calibrator(
                len(split.class_names), settings.calibrator, settings.feedback, context.device, context.together,
                student_lr=settings.optimizer.lr,
            )  # fmt: skip
            figures = train_and_save(
                context, network, calibrator, data, settings, folder, basis,
                watch=calibration_log(context, folder, calibrator, store),
            )  # fmt: skip
            if context.first:
                save_calibrator(folder / "calibrator.safetensors", calibrator)
        else:
            figures = train_and_save(context, network, FixedTargets(), data, settings, folder, basis)
    method = {"calibrator": "Reduced MPL", "fixed": "NoisyStudent", "none": "Supervised"}[settings.teacher]
    return figures | {
        "method": method,
        "labelled_images": len(labelled.labels),
        "pool_images": 0 if pool is None else len(pool),
        "pool_reading": None if pool is None else way,
        "batch_of": {"labelled": composition.labelled, "pool": composition.pool},
        "labelled_target": "label" if composition.true_labels else "teacher",
    }


def labelled_set(images: "Images", store: "TargetsStore | None") -> "LabelledSet":
    """Labelled images, with the teacher's stored distributions joined by (shard, row)."""
    import torch

    from pipeline.errors import TargetsError
    from pipeline.student_data import LabelledSet

    if store is None:
        return LabelledSet(images.images, images.labels)
    stored = store.labelled()
    places = {identity: i for i, identity in enumerate(zip(stored.shard, stored.row.tolist(), strict=True))}
    try:
        order = [places[identity] for identity in zip(images.shards, images.rows.tolist(), strict=True)]
    except KeyError as error:
        raise TargetsError(
            f"targets/ holds no distribution for labelled image {error.args[0]}: it was made for other labelled "
            "images. Run mpl precompute --force"
        ) from None
    return LabelledSet(images.images, images.labels, torch.from_numpy(stored.distributions[order]))


def pool_set(context: Context, store: "TargetsStore", made: str) -> "PoolSet":
    """The selected pool, decoded, with distributions and repeats; `made` is the store's fingerprint."""
    import torch

    from pipeline.errors import TargetsError
    from pipeline.student_data import PoolSet
    from stages.learning import decode

    images = decode(context, store.samples(), "targets", made)
    if images.skipped:
        raise TargetsError(f"{len(images.skipped)} images in targets/ do not decode; run mpl precompute --force")
    return PoolSet(images.images, torch.from_numpy(store.distributions()), torch.from_numpy(store.repeats()))


def streamed_pool(context: Context, store: "TargetsStore") -> "StreamedPool":
    """The selected pool, read and decoded while the student trains."""
    from pipeline.targets.stream import StreamedPool

    settings = context.recipe
    return StreamedPool(store, settings.data.image_size, workers=settings.train_reduced.workers)


def calibration_log(
    context: Context, folder: Path, calibrator: "Calibrator", store: "TargetsStore | None"
) -> "CalibrationLog":
    """Follows the first images of the store, whose order is random, into calibration.json."""
    import torch

    from pipeline.calibration import FILE, SAMPLE, CalibrationLog

    assert store is not None
    first = next(store.batches(SAMPLE))
    images = [{"shard": shard, "row": sample.row, "key": sample.key} for shard, sample in first.samples]
    teacher = torch.from_numpy(first.distributions).to(context.device)
    steps = context.recipe.train_reduced.steps
    return CalibrationLog(folder / FILE, calibrator.network, teacher, images, store.class_names, steps)


def save_calibrator(path: Path, calibrator: Any) -> None:
    """Write q_Ψ's weights."""
    from safetensors.torch import save_file

    from pipeline.storage.files import whole_file

    with whole_file(path) as temporary:
        save_file({k: v.contiguous() for k, v in calibrator.network.state_dict().items()}, temporary)
