"""`mpl train-mpl`: labelled images + the pool → student/, by full Meta Pseudo Labels or by one method alone."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options, with_changes
from stages.students import NAME_HELP

if TYPE_CHECKING:
    from pipeline.config import TrainMplSettings
    from pipeline.models import Network
    from pipeline.student_data import LabelledSet, PoolSet
    from pipeline.teacher_network import TeacherNetwork
    from stages.execution import Stage


@click.command()
@stage_options
@click.option("--method", metavar="NAME", help="What trains the teacher: supervised, label_smoothing, randaugment, "
              "mixup, pseudo_labels, uda, fixmatch.")  # fmt: skip
@click.option("--feedback", type=click.Choice(["soft", "hard", "none"]),
              help="soft: exact, of soft labels. hard: of sampled labels. none: the teacher gets none.")  # fmt: skip
@click.option("--alone", is_flag=True, help="The method by itself, without a student: the baseline.")
@click.option("--name", help=NAME_HELP)
def command(context: Context, method: str | None, feedback: str | None, alone: bool, name: str | None) -> None:
    """Train teacher and student together (Meta Pseudo Labels), or a baseline.

    Reads: the labelled split and the pool. Writes: student/model.safetensors, config.json, metrics.csv, and the
    teacher in student/teacher/.
    """
    from stages.execution import execute

    context = with_changes(
        context, train_mpl__method=method, train_mpl__feedback=feedback, train_mpl__alone=True if alone else None
    )
    execute(context, lambda c: plan(c, name))


def plan(context: Context, name: str | None = None) -> "Stage":
    """Plan the stage."""
    from pipeline.checkpoints import CHECKPOINTS
    from stages.execution import Stage
    from stages.learning import network_outputs, require_engine, split_of, training_basis
    from stages.students import own_student, stage_name, student_folder

    settings = settings_of(context)
    if settings.feedback == "soft" and not settings.alone:
        require_engine(context, settings.model, settings.feedback_options)
    folder = student_folder(context, name)
    inputs: dict[str, Any] = {"labelled": split_of(context, "labelled").fingerprint()}
    if uses_pool(settings):
        inputs["pool"] = split_of(context, "unlabelled").fingerprint()
    if not settings.alone and settings.teacher.start == "pretrain":
        inputs["teacher"] = context.run.require("pretrain", "mpl pretrain")["result"]["weights_sha256"]
    basis = training_basis(context, settings, **inputs)
    irrelevant = {"feedback", "feedback_options", "student_wait", "teacher"} if settings.alone else set()
    basis["settings"] = {k: v for k, v in basis["settings"].items() if k not in irrelevant}
    outputs = network_outputs(folder)
    if not settings.alone:
        outputs += network_outputs(folder / "teacher")
    stage = Stage(
        name=stage_name("train-mpl", name),
        basis=basis,
        outputs=outputs,
        work=lambda: work(context, folder, basis),
        summary=lambda result: f"{result['method']}: {result['validation']['top1']:.2f}% on validation",
        replaces=[folder],
        leftovers=[folder / CHECKPOINTS],
        keeps_recipe=name is None,
        together=True,
    )
    return own_student(context, stage, "train-mpl", name)


def settings_of(context: Context) -> "TrainMplSettings":
    """The recipe's section.

    Raises:
        RecipeError: it has none.
    """
    from pipeline.errors import RecipeError

    settings = context.recipe.train_mpl
    if settings is None:
        raise RecipeError(
            f"recipe {context.recipe.name} has no train_mpl section; take one that has (digits, cifar10-4k), "
            "or add it: the recipe digits shows one"
        )
    return settings


def uses_pool(settings: "TrainMplSettings") -> bool:
    """Whether any pool image is seen."""
    return not settings.alone or bool({"pool", "pool_weak"} & settings.method.needs)


def method_title(settings: "TrainMplSettings") -> str:
    """For people: what is trained."""
    if settings.alone:
        return settings.method.name
    kind = {"soft": "soft feedback", "hard": "hard feedback", "none": "no feedback"}[settings.feedback]
    return f"MPL with {settings.method.name}, {kind}"


def work(context: Context, folder: Path, basis: dict[str, Any]) -> dict[str, Any]:
    """Train: one loop; what gives the targets is a teacher network, or the method's own lessons."""
    from pipeline.distributed.layouts import bare, full_state
    from pipeline.feedback import log_probabilities
    from pipeline.lessons import Lessons, ViewData
    from pipeline.models import build_network, save_network
    from pipeline.teachers import FixedTargets
    from stages.learning import (
        load_split,
        seed_initialisation,
        split_of,
        tell_feedback_batch,
        to_device,
        train_and_save,
    )

    recipe, settings = context.recipe, settings_of(context)
    split = split_of(context, "labelled")
    images = load_split(context, split)
    pool = pool_set(context) if uses_pool(settings) else None
    seed_initialisation(context, "student")  # the same initial weights for every method of a seed
    network = build_network(
        settings.model, split.class_names, recipe.data.image_size, recipe.data.mean, recipe.data.std
    )
    to_device(network, context.device)
    views = ViewData(
        labelled_images(images), pool, settings,
        classes=len(split.class_names), mean=recipe.data.mean, std=recipe.data.std,
        seed=context.seed, device=context.device,
        label_noise=0.0 if settings.alone else settings.teacher.label_noise,
        ranks=context.together,
    )  # fmt: skip
    described: dict[str, Any] = {
        "method": method_title(settings),
        "labelled_images": len(images),
        "pool_images": 0 if pool is None else len(pool),
        "batch_of": {"labelled": settings.labelled_batch, "pool": settings.batch if pool is not None else 0},
    }
    with closing(views):
        if settings.alone:

            def predict(batch: Any) -> Any:
                import torch

                with torch.no_grad():
                    return log_probabilities(network.model, batch, context.autocast).exp()  # bare: no talk of ranks

            lessons = Lessons(views, settings.method, predict)
            figures = train_and_save(
                context, network, FixedTargets(), lessons, settings, folder, basis, train_set=images
            )
            return figures | described
        teacher_network = build_teacher(context, split.class_names)
        teacher = make_teacher(context, teacher_network)
        if teacher.feedback != "none":
            tell_feedback_batch(context, settings.feedback_options.batch, views)
        figures = train_and_save(
            context, network, teacher, views, settings, folder, basis,
            wait=settings.student_wait, train_set=images, watched={"teacher": teacher.model},
        )  # fmt: skip
        state = full_state(bare(teacher.model), context.together)
        digest = save_network(folder / "teacher", teacher_network, state) if context.first else ""
    return figures | described | {"teacher_sha256": digest}


def labelled_images(images: Any) -> "LabelledSet":
    """Labelled images as the library takes them."""
    from pipeline.student_data import LabelledSet

    return LabelledSet(images.images, images.labels)


def pool_set(context: Context) -> "PoolSet":
    """All pool images that decode; each counts once."""
    import torch

    from pipeline.student_data import PoolSet
    from stages.learning import load_split, split_of

    images = load_split(context, split_of(context, "unlabelled"))
    n = len(images)
    return PoolSet(images.images, torch.empty(n, 0), torch.ones(n, dtype=torch.int64))


def build_teacher(context: Context, class_names: tuple[str, ...]) -> "Network":
    """The teacher's network: fresh, or as `mpl pretrain` left it; on the device, in training mode.

    Raises:
        DataError: the pretrained one has other classes.
    """
    from pipeline.models import build_network, load_network
    from stages.learning import check_classes, seed_initialisation, to_device

    recipe, settings = context.recipe, settings_of(context)
    if settings.teacher.start == "pretrain":
        network = load_network(context.run / "teacher")
        check_classes(network, class_names, str(context.run / "teacher"))
    else:
        seed_initialisation(context, "teacher")
        model = settings.teacher.model or settings.model
        network = build_network(model, class_names, recipe.data.image_size, recipe.data.mean, recipe.data.std)
    to_device(network, context.device)
    network.model.train()
    return network


def make_teacher(context: Context, network: "Network") -> "TeacherNetwork":
    """The teacher of the recipe around its network."""
    from pipeline.distributed.layouts import bare, lay_out
    from pipeline.optim import build_optimizer
    from pipeline.teacher_network import TeacherNetwork
    from stages.learning import layout_of

    settings = settings_of(context)
    optimizer = settings.teacher.optimizer or settings.optimizer
    model = lay_out(network.model, layout_of(context), context.together)
    return TeacherNetwork(
        model,
        build_optimizer(bare(model), optimizer),
        settings.method,
        settings.feedback,
        settings.feedback_options,
        schedule=settings.teacher.schedule or settings.schedule,
        base_lr=optimizer.lr,
        steps=settings.steps,
        seed=context.seed,
        clip_norm=optimizer.clip_norm,
        autocast=context.autocast,
        ranks=context.together,
        micro_batches=context.recipe.distributed.micro_batches,
    )
