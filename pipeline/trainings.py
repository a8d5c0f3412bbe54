"""The four trainings of a recipe: the large teacher, Reduced MPL and its baselines, full MPL, finetuning.

One loop (`pipeline.training`); what differs is the teacher, and what a batch consists of.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.answers.out_of_fold import OutOfFold, write_out_of_fold
from pipeline.assembly import Assembly, Looks, Output
from pipeline.batches import Batches, FeedbackImages, MethodAlone, MethodViews, Mixture, mixture
from pipeline.calibration import FILE, SAMPLE, CalibrationLog
from pipeline.config import Reading, Recipe, TrainMplSettings, TrainReducedSettings, TrainSettings
from pipeline.correction import Correction, class_map_of, fit_correction, fit_prior, fit_scaling
from pipeline.correction.fit import deal_to_folds
from pipeline.data.decoded import Images
from pipeline.data.sets import LabelledSet, Pool, PoolSet
from pipeline.distributed import ALONE
from pipeline.distributed.layouts import bare, full_state, lay_out
from pipeline.errors import DataError, RecipeError, TargetsError
from pipeline.gradient.replay import log_probabilities
from pipeline.networks.classes import order_of
from pipeline.networks.folders import save_network
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, to_device
from pipeline.optim import build_optimizer, learning_rate
from pipeline.storage.files import fingerprint, whole_file
from pipeline.storage.ours import remove_ours
from pipeline.targets import TargetsStore
from pipeline.targets.store import joined
from pipeline.targets.stream import StreamedPool
from pipeline.teacher_network import TeacherNetwork, TeacherRule
from pipeline.teachers import Calibrator, FixedTargets

REDUCED_TITLES = {"calibrator": "Reduced MPL", "fixed": "NoisyStudent", "none": "Supervised"}
CALIBRATOR = "calibrator.safetensors"
FOLDS = "folds"  # folder of the networks of folds, while they are trained
MOST_USES = 1 << 28  # of images in an epoch: the order of an epoch is in memory, 8 bytes each


def pretrain(assembly: Assembly, output: Output) -> dict[str, Any]:
    """The large teacher, on labelled images; returns figures for the record."""
    settings, split = assembly.recipe.pretrain, assembly.data.split("labelled")
    images = assembly.data.images(split)
    network = assembly.network(settings.model, split.class_names, "teacher")
    labelled = LabelledSet(images.images, images.labels, len(split.class_names))
    held_out = cross_fit(assembly, output, images, labelled, split.class_names) if settings.folds else {}
    batches = assembly.batches(network, labelled, true_labels(settings), label_noise=settings.label_noise)
    figures = assembly.train(network, FixedTargets(), batches, settings, output)
    return figures | {"labelled_images": len(images), "classes": len(split.class_names)} | held_out


def cross_fit(
    assembly: Assembly, output: Output, images: Images, labelled: LabelledSet, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """A network for each fold, trained on the others as the teacher is; leaves out_of_fold.parquet.

    Each trains in a folder of its own, so that a killed one goes on, and those that are done end at once.

    Returns:
        Figures for the record: how often the held-out answers are right, percent.

    Raises:
        DataError: there are fewer labelled images than folds.
    """
    settings, ranks = assembly.recipe.pretrain, assembly.placement.ranks
    if len(labelled) < settings.folds:
        raise DataError(
            f"{len(labelled)} labelled images cannot be dealt to pretrain.folds = {settings.folds}"
        ).on_all()
    fold = deal_to_folds(labelled.labels.numpy(), settings.folds, assembly.seed)
    q = torch.zeros(len(labelled), len(class_names))
    for number in range(settings.folds):
        inside, outside = (np.flatnonzero(chosen) for chosen in (fold != number, fold == number))
        network = assembly.network(settings.model, class_names, "teacher")
        part = labelled.rows(inside)
        fewer = settings.model_copy(update={"batch": min(settings.batch, len(part)), "evaluate_every": 0})
        batches = assembly.batches(network, part, true_labels(fewer), label_noise=settings.label_noise)
        place = Output(output.folder / FOLDS / f"fold-{number}", fingerprint([output.identity, "fold", number]))
        assembly.train(network, FixedTargets(), batches, fewer, place)
        if ranks.first:
            trained = to_device(load_network(place.folder), assembly.placement.device)
            trained.model.eval()
            judge = assembly.judge(replace(images, images=images.images[torch.from_numpy(outside)]), trained)
            q[torch.from_numpy(outside)] = replace(judge, ranks=ALONE).probabilities(trained.model)
    if not ranks.first:
        return {}
    found = OutOfFold(list(images.shards), images.rows, labelled.labels.numpy(), fold, q.numpy())
    write_out_of_fold(output.folder, found, class_names)
    remove_ours(output.folder / FOLDS)
    right = float((q.argmax(dim=1) == labelled.labels).float().mean())
    return {"folds": settings.folds, "out_of_fold_top1": round(100 * right, 4)}


def finetune(assembly: Assembly, output: Output, student: Path) -> dict[str, Any]:
    """A student trained on with true labels, from its averaged weights; returns figures for the record."""
    settings, split = assembly.recipe.finetune, assembly.data.split("labelled")
    network = to_device(load_network(student), assembly.placement.device)
    images = assembly.data.images(split, network.image_size, network.framing)
    labelled = LabelledSet(images.images, images.labels, len(split.class_names))
    batches = assembly.batches(network, labelled, true_labels(settings))
    return assembly.train(network, FixedTargets(), batches, settings, output)


def true_labels(settings: TrainSettings) -> Mixture:
    """Batches of labelled images alone."""
    return Mixture(settings.batch, augment=settings.augment, label_smoothing=settings.label_smoothing)


# --- Reduced MPL and its baselines ------------------------------------------------------------------------


def pool_reading(recipe: Recipe, images: int, classes: int) -> Reading:
    """How the pool is read. The two ways have different orders, and so different results."""
    chosen, data = recipe.train_reduced.reading, recipe.data
    if chosen != "auto":
        return chosen
    decoded = images * (3 * data.image_size**2 + 4 * classes)  # bytes: pixels, distribution in float32
    return "memory" if decoded <= data.memory_gib * 2**30 else "stream"


def train_reduced(
    assembly: Assembly, output: Output, store: TargetsStore | None, reading: Reading = "memory"
) -> dict[str, Any]:
    """The student under the recipe's teacher, from stored targets; returns figures for the record.

    Args:
        assembly: recipe, data, placement.
        output: also gets calibrator.safetensors and calibration.json.
        store: the teacher's distributions; None where the student learns from labelled images alone.
        reading: of the pool.
    """
    settings, split = assembly.recipe.train_reduced, assembly.data.split("labelled")
    composition = mixture(settings, settings.teacher)
    correction = None if store is None else training_correction(assembly, store)
    embedding = seen_embedding(settings, store)
    labelled = with_stored(assembly.data.images(split), store, len(split.class_names), embedding > 0)
    require_stored(settings, composition, labelled)
    pool = None if store is None else open_pool(assembly, store, reading)
    network = assembly.network(settings.model, split.class_names, "student")
    adapts = settings.teacher == "calibrator"
    options = settings.feedback
    feedback = FeedbackImages(options.batch, options.augment, options.held_out if adapts else 0.0)
    with closing(
        assembly.batches(network, labelled, composition, pool, feedback, correction=correction, embedding=embedding)
    ) as batches:
        if adapts:
            assert store is not None
            figures = _with_calibrator(assembly, output, network, batches, store)
        else:
            figures = assembly.train(network, FixedTargets(), batches, settings, output)
    return figures | {
        "method": REDUCED_TITLES[settings.teacher],
        "labelled_images": len(labelled),
        "pool_images": 0 if pool is None else len(pool),
        "pool_reading": None if pool is None else reading,
        "batch_of": {"labelled": composition.labelled, "pool": composition.pool},
        "labelled_target": "label" if composition.true_labels else "teacher",
    }


def _with_calibrator(
    assembly: Assembly, output: Output, network: Network, batches: Batches, store: TargetsStore
) -> dict[str, Any]:
    settings, placement = assembly.recipe.train_reduced, assembly.placement
    assembly.tell_feedback_batch(batches)
    assembly.seed_initialisation("calibrator")
    calibrator = Calibrator(
        batches.labelled.classes,
        settings.calibrator,
        settings.feedback,
        placement,
        settings.optimizer.lr,
        batches.stored_classes,
        batches.sets.embedding,
        ratios=batches.has_other_classes,
    )
    log = calibration_log(output.folder / FILE, calibrator, store, batches, settings.steps)
    figures = assembly.train(network, calibrator, batches, settings, output, Looks(watch=log))
    if placement.ranks.first:
        with whole_file(output.folder / CALIBRATOR) as temporary:
            save_file({k: v.contiguous() for k, v in calibrator.network.state_dict().items()}, temporary)
    return figures


def seen_embedding(settings: TrainReducedSettings, store: TargetsStore | None) -> int:
    """Numbers of each image's embedding that the teacher sees; 0: it sees none."""
    sees = settings.teacher == "calibrator" and settings.calibrator.embedding
    return store.embedding if store is not None and sees else 0


def with_stored(images: Images, store: TargetsStore | None, classes: int, embeddings: bool = False) -> LabelledSet:
    """Labelled images, with the teacher's stored distributions joined by (shard, row), and embeddings if wanted.

    Raises:
        TargetsError: the store has none for one of them.
    """
    if store is None:
        return LabelledSet(images.images, images.labels, classes)
    stored = store.labelled()
    places = {identity: i for i, identity in enumerate(zip(stored.shard, stored.row.tolist(), strict=True))}
    try:
        order = [places[identity] for identity in zip(images.shards, images.rows.tolist(), strict=True)]
    except KeyError as error:
        if store.manifest.get("stored_answers"):
            return LabelledSet(images.images, images.labels, classes)
        raise TargetsError(
            f"targets/ holds no distribution for labelled image {error.args[0]}: it was made for other labelled "
            "images. Run mpl precompute --force"
        ) from None
    rows = (joined(stored.distributions, stored.embeddings) if embeddings else stored.distributions)[order]
    return LabelledSet(images.images, images.labels, classes, torch.from_numpy(rows))


def require_stored(settings: TrainReducedSettings, composition: Mixture, labelled: LabelledSet) -> None:
    """Refuse what asks for the teacher's distributions of labelled images where predictions do not answer all of them.

    Raises:
        TargetsError: names the setting.
    """
    if labelled.distributions is not None or settings.teacher == "none":
        return
    wanted = []
    if composition.labelled and not composition.true_labels:
        wanted.append("train_reduced.labelled_target=teacher")
    if settings.teacher == "calibrator" and settings.calibrator.supervised_weight:
        wanted.append("train_reduced.calibrator.supervised_weight")
    if wanted:
        raise TargetsError(
            f"{' and '.join(wanted)} needs the teacher's answers about the labelled images, and the predictions do not "
            "answer all of them: add theirs to the files, or change the setting"
        )


def training_correction(assembly: Assembly, store: TargetsStore) -> Correction:
    """From the stored distributions to the data set's classes: as the images were selected, or as the recipe says.

    Raises:
        RecipeError: the identity, of a teacher with classes of its own.
    """
    kind, selected = assembly.recipe.train_reduced.correction, store.correction()
    if kind in ("auto", selected.kind):
        return selected
    theirs, ours = store.class_names, store.target_names
    if kind == "identity":
        if theirs != ours:
            raise RecipeError("train_reduced.correction=identity is for a teacher with the data set's classes")
        return Correction.identity(ours)
    mapped = selected.class_map
    if mapped is None and theirs != ours:
        mapped = class_map_of(None, theirs, ours, complete=kind != "fit")
    start = Correction.identity(ours) if mapped is None else Correction.mapped(theirs, ours, mapped)
    if kind == "map":
        return start
    stored = store.labelled()
    if kind in ("prior-em", "prior-bbse"):
        return fit_prior(kind, stored.distributions, stored.labels, store.distributions(), start)
    if kind == "scaling":
        return fit_scaling(stored.distributions, stored.labels, theirs, ours, mapped)
    return fit_correction(stored.distributions, stored.labels, theirs, ours, mapped, seed=assembly.seed).correction


def open_pool(assembly: Assembly, store: TargetsStore, reading: Reading) -> Pool:
    """The selected pool with distributions and repeats: decoded into memory, or while the student trains.

    Raises:
        TargetsError: an image of the store does not decode.
    """
    recipe = assembly.recipe
    embeddings = seen_embedding(recipe.train_reduced, store) > 0
    if (uses := int(store.uses().sum())) > MOST_USES:
        raise TargetsError(
            f"{store.folder}: {store.count:,} images are used {uses:,} times in an epoch (--upsample up to K), and "
            f"{MOST_USES:,} are the limit: choose a smaller K in mpl filter"
        )
    if reading == "stream":
        workers = recipe.train_reduced.workers
        return StreamedPool(store, recipe.data.image_size, workers=workers, embeddings=embeddings)
    images = assembly.data.decoded(store.samples(), "targets", store.manifest["fingerprint"])
    if images.skipped:
        raise TargetsError(f"{len(images.skipped)} images in targets/ do not decode; run mpl precompute --force")
    rows = joined(store.distributions(), store.embeddings()) if embeddings else store.distributions()
    return PoolSet(images.images, torch.from_numpy(store.repeats()), torch.from_numpy(rows))


def calibration_log(
    path: Path, calibrator: Calibrator, store: TargetsStore, batches: Batches, steps: int
) -> CalibrationLog:
    """Follows the first images of the store, whose order is random, into calibration.json."""
    first = next(store.batches(SAMPLE))
    images = [{"shard": shard, "row": sample.row, "key": sample.key} for shard, sample in first.samples]
    device = next(calibrator.network.parameters()).device
    rows = joined(first.distributions, first.embeddings) if batches.sets.embedding else first.distributions
    targets, stored = batches.corrected(torch.from_numpy(rows))
    seen = None if stored is None else stored.to(device)

    def network(q: Tensor) -> Tensor:
        return calibrator.network.parts(q, seen)[0]

    return CalibrationLog(path, network, targets.to(device), images, store.target_names, steps)


# --- full MPL, and methods alone --------------------------------------------------------------------------


def mpl_settings(recipe: Recipe) -> TrainMplSettings:
    """The recipe's section.

    Raises:
        RecipeError: it has none.
    """
    if recipe.train_mpl is None:
        raise RecipeError(
            f"recipe {recipe.name} has no train_mpl section; take one that has (digits, cifar10-4k), "
            "or add it: the recipe digits shows one"
        )
    return recipe.train_mpl


def uses_pool(settings: TrainMplSettings) -> bool:
    """Whether any pool image is seen."""
    return not settings.alone or bool({"pool", "pool_weak"} & settings.method.needs)


def method_title(settings: TrainMplSettings) -> str:
    """For people: what is trained."""
    if settings.alone:
        return settings.method.name
    kind = {"soft": "soft feedback", "hard": "hard feedback", "none": "no feedback"}[settings.feedback]
    return f"MPL with {settings.method.name}, {kind}"


def train_mpl(assembly: Assembly, output: Output, pretrained: Path) -> dict[str, Any]:
    """Teacher and student together, or a method alone; returns figures for the record.

    Args:
        assembly: recipe, data, placement.
        output: also gets teacher/.
        pretrained: folder of the network that the teacher starts from, where the recipe says so.
    """
    settings, split = mpl_settings(assembly.recipe), assembly.data.split("labelled")
    images = assembly.data.images(split)
    pool = whole_pool(assembly) if uses_pool(settings) else None
    network = assembly.network(settings.model, split.class_names, "student")
    labelled = LabelledSet(images.images, images.labels, len(split.class_names))
    views, options = MethodViews(settings), settings.feedback_options
    feeds_back = settings.feedback != "none" and not settings.alone
    feedback = FeedbackImages(options.batch, options.augment, options.held_out if feeds_back else 0.0)
    noise = 0.0 if settings.alone else settings.teacher.label_noise
    composition = MethodAlone(views, predictions(network, assembly.placement.autocast)) if settings.alone else views
    with closing(assembly.batches(network, labelled, composition, pool, feedback, noise)) as batches:
        if settings.alone:
            looks = Looks(train_set=images)
            figures = assembly.train(network, FixedTargets(), batches, settings, output, looks)
        else:
            figures = _with_teacher(assembly, output, network, batches, images, pretrained)
    return figures | {
        "method": method_title(settings),
        "labelled_images": len(images),
        "pool_images": 0 if pool is None else len(pool),
        "batch_of": {"labelled": settings.labelled_batch, "pool": settings.batch if pool is not None else 0},
    }


def _with_teacher(
    assembly: Assembly, output: Output, network: Network, batches: Batches, images: Images, pretrained: Path
) -> dict[str, Any]:
    settings, ranks = mpl_settings(assembly.recipe), assembly.placement.ranks
    teacher_network = build_teacher(assembly, tuple(network.class_names), pretrained)
    if (teacher_network.mean, teacher_network.std) != (network.mean, network.std):
        raise RecipeError(
            "teacher and student see the same batches, and their weights want them normalised differently "
            f"({teacher_network.mean} and {network.mean}): choose weights that agree, or set data.mean and data.std to "
            "those of the pretrained one"
        ).on_all()
    teacher = make_teacher(assembly, teacher_network)
    if settings.feedback != "none":
        assembly.tell_feedback_batch(batches)
    looks = Looks(train_set=images, watched={"teacher": teacher.model})
    figures = assembly.train(network, teacher, batches, settings, output, looks)
    state = full_state(bare(teacher.model), ranks)
    digest = save_network(output.folder / "teacher", teacher_network, state) if ranks.first else ""
    return figures | {"teacher_sha256": digest}


def predictions(network: Network, autocast: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, S, S) → probabilities (B, C), without a gradient; of the bare network: no talk of ranks."""

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return log_probabilities(network.model, images, autocast).exp()

    return predict


def whole_pool(assembly: Assembly) -> PoolSet:
    """All pool images that decode; each counts once."""
    split = assembly.data.split("unlabelled")
    images = assembly.data.images(split)
    return PoolSet(images.images, torch.ones(len(images), dtype=torch.int64))


def build_teacher(assembly: Assembly, class_names: tuple[str, ...], pretrained: Path) -> Network:
    """The teacher's network: fresh, or as `pretrain` left it; on the device, in training mode.

    Raises:
        DataError: the pretrained one has other classes.
    """
    settings = mpl_settings(assembly.recipe)
    if settings.teacher.start == "pretrain":
        network = to_device(load_network(pretrained), assembly.placement.device)
        if order_of(network.class_names, class_names, str(pretrained)) != list(range(len(class_names))):
            raise DataError(
                f"{pretrained} has the data set's classes in another order; make it again: mpl pretrain --force"
            )
    else:
        network = assembly.network(settings.teacher.model or settings.model, class_names, "teacher")
    network.model.train()
    return network


def make_teacher(assembly: Assembly, network: Network) -> TeacherNetwork:
    """The teacher of the recipe around its network, laid out over the processes."""
    settings, placement = mpl_settings(assembly.recipe), assembly.placement
    optimizer = settings.teacher.optimizer or settings.optimizer
    schedule = settings.teacher.schedule or settings.schedule
    model = lay_out(network.model, placement.layout, placement.ranks)
    rule = TeacherRule(
        settings.method,
        settings.feedback,
        settings.feedback_options,
        learning_rate=lambda step: learning_rate(schedule, optimizer.lr, step, settings.steps),
        clip_norm=optimizer.clip_norm,
        seed=assembly.seed,
    )
    return TeacherNetwork(model, build_optimizer(bare(model), optimizer), rule, placement)
