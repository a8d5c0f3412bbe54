"""What the training stages share: splits in memory, settings that matter, train and save."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import (
    DataSettings,
    DistributedSettings,
    EvaluateSettings,
    FeedbackSettings,
    ModelSettings,
    TrainSettings,
)
from pipeline.data.decode import default_workers
from pipeline.data.decoded import Images, load_images
from pipeline.data.manifest import Manifest, SplitName, load_manifest
from pipeline.data.readers.shard import Sample
from pipeline.data.sources import Split, open_split
from pipeline.distributed import ALONE, Ranks
from pipeline.distributed.launch import processes_here
from pipeline.distributed.layouts import Layout, bare
from pipeline.errors import DataError
from pipeline.evaluate import Evaluation, evaluate_logits, predict_logits
from pipeline.feedback import check_engine
from pipeline.lessons import ViewData
from pipeline.models import CONFIG, WEIGHTS, Network, save_network
from pipeline.seeds import derive_seed
from pipeline.storage.files import fingerprint
from pipeline.storage.runs import peak_memory_mib
from pipeline.student_data import StudentData
from pipeline.teachers import Teacher
from pipeline.training import Batches, Training
from stages.options import Context

INTERVALS = {"log_every", "evaluate_every", "checkpoint_every", "checkpoint_seconds"}  # change no result


def manifest_of(context: Context) -> Manifest:
    """The data set of the recipe."""
    return load_manifest(context.recipe.data.manifest, context.data)


def split_of(context: Context, name: SplitName) -> Split:
    """A split of the recipe's data set; the labelled one cut as the recipe says."""
    first = context.recipe.data.labelled if name == "labelled" else None
    return open_split(manifest_of(context), name, context.data, first=first)


def load_split(context: Context, split: Split, size: int | None = None) -> Images:
    """Decode a split; what did not decode is told."""
    images = decode(context, split.read(), split.name, split.fingerprint(), size)
    if images.skipped:
        first = images.skipped[0]
        context.console.note(
            f"{split.name}: {len(images.skipped)} of {split.count()} images cannot be used "
            f"(first: {first.shard} row {first.row}, {first.key}: {first.status}, {first.detail})"
        )
    return images


def decode(
    context: Context, samples: Iterable[tuple[str, Sample]], name: str, identity: str, size: int | None = None
) -> Images:
    """Decode to the recipe's size, or another; beyond `data.memory_gib` into a file that all processes share.

    `identity` changes when the samples do.
    """
    settings = context.recipe.data
    size = size or settings.image_size
    return load_images(
        samples,
        size,
        place=context.run.decoded / f"{name}-{fingerprint([identity, size])[:16]}",
        memory_limit=int(settings.memory_gib * 2**30) // processes_here(),
        workers=default_workers(size),
    )


def training_basis(context: Context, settings: TrainSettings, **inputs: Any) -> dict[str, Any]:
    """Basis of a training stage: every setting that changes its result, and its inputs."""
    return {
        "settings": settings.model_dump(mode="json", exclude=INTERVALS),
        "data": data_basis(context.recipe.data),
        "seed": context.seed,
        "precision": context.precision,
        **_parts(context.recipe.distributed),
        **inputs,
    }


def _parts(settings: DistributedSettings) -> dict[str, Any]:
    """What batch statistics are taken over, where that is not the whole batch of a process."""
    chosen = {"micro_batches": settings.micro_batches, "sync_batch_norm": settings.sync_batch_norm}
    return {} if chosen == {"micro_batches": 1, "sync_batch_norm": False} else {"distributed": chosen}


def layout_of(context: Context) -> Layout:
    """How networks lie on the processes."""
    settings = context.recipe.distributed
    return Layout(settings.layout, settings.shard_size, settings.sync_batch_norm, settings.checkpoint_activations)


def require_engine(context: Context, student: ModelSettings, settings: FeedbackSettings) -> None:
    """Refuse, before anything is loaded, feedback by an engine that cannot differentiate the student as it will lie.

    Raises:
        FeedbackError: says which can.
    """
    sharded = layout_of(context).shards(context.together)
    check_engine(student.name, settings.engine, sharded=sharded, autocast=context.autocast)


def data_basis(settings: DataSettings) -> dict[str, Any]:
    """The part of the data settings that changes results."""
    return settings.model_dump(mode="json", exclude={"memory_gib"})


@dataclass(frozen=True)
class Judge:
    """Evaluates networks on one split held in memory."""

    images: Images
    network: Network
    settings: EvaluateSettings
    device: torch.device
    autocast: torch.dtype | None
    ranks: Ranks = ALONE

    def __call__(self, model: nn.Module) -> Evaluation:
        logits = predict_logits(
            model,
            self.images.images,
            self.network.mean,
            self.network.std,
            batch=self.settings.batch,
            device=self.device,
            autocast=self.autocast,
            ranks=self.ranks,
        )
        return evaluate_logits(logits, self.images.labels, self.settings.bins)

    def for_log(self, model: nn.Module) -> dict[str, float]:
        """Figures for metrics.csv."""
        found = self(model)
        return {"top1": found.top1, "nll": found.nll}


def train_and_save(
    context: Context,
    network: Network,
    teacher: Teacher,
    data: Batches,
    settings: TrainSettings,
    folder: Path,
    basis: dict[str, Any],
    *,
    wait: int = 0,
    train_set: Images | None = None,
    watched: dict[str, nn.Module] | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Train `network` under `teacher`; leave its moving average in `folder` in timm's layout.

    The validation split is looked at for the log and the record; nothing is chosen by it here. With a
    `train_set` the log also has the accuracy on those labelled images, unaugmented; and the same of `watched`
    networks beside the student's average. `watch` is told how many steps are done.
    """
    validation = load_split(context, split_of(context, "validation"), network.image_size)
    judge = Judge(validation, network, context.recipe.evaluate, context.device, context.autocast, context.together)

    def look(model: nn.Module) -> dict[str, float]:
        figures = {f"validation_{key}": value for key, value in judge.for_log(model).items()}
        if train_set is not None:
            on_train = replace(judge, images=train_set)
            figures["train_top1"] = on_train(model).top1
            for name, other in ((name, bare(model)) for name, model in (watched or {}).items()):
                figures[f"{name}_validation_top1"] = judge(other).top1
                figures[f"{name}_train_top1"] = on_train(other).top1
        return figures

    training = Training(
        network.model,
        teacher,
        data,
        settings,
        folder=folder,
        identity=fingerprint(basis),
        seed=context.seed,
        observer=context.console,
        validate=look,
        autocast=context.autocast,
        wait=wait,
        watch=watch if context.first else lambda done: None,
        ranks=context.together,
        layout=layout_of(context),
        micro_batches=context.recipe.distributed.micro_batches,
    )
    figures = training.run()
    state = training.averaged_state()
    digest = save_network(folder, network, state) if context.first else ""
    found = judge(training.average.module)
    return figures | {
        "checkpoint": "last step, moving average",
        "weights_sha256": digest,
        "validation": found.as_json(network.class_names),
        "train_peak_memory_mib": round(peak_memory_mib(), 1),
    }


def tell_feedback_batch(context: Context, asked: int, data: StudentData | ViewData) -> None:
    """A note where the processes do not divide the labelled images that give feedback."""
    wanted = min(asked, len(data.feedback_labelled.labels))
    if data.feedback_batch < wanted:
        context.console.note(
            f"feedback is measured on {data.feedback_batch} labelled images a step instead of {wanted}, "
            f"which the {context.together.world} processes do not divide"
        )


def network_outputs(folder: Path) -> list[Path]:
    """Files of a saved network."""
    return [folder / WEIGHTS, folder / CONFIG]


def seed_initialisation(context: Context, purpose: str) -> None:
    """Seed torch's default generator for the initial weights of one network."""
    torch.manual_seed(derive_seed(context.seed, "initialisation", purpose))


def to_device(network: Network, device: torch.device) -> Network:
    """Move the weights, channels last: on CPUs convolutions are several times faster so."""
    network.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def check_classes(network: Network, names: tuple[str, ...], where: str) -> None:
    """Refuse a network whose class list is not the data set's.

    Raises:
        DataError: with both lists.
    """
    unnamed = network.class_names == [str(c) for c in range(len(names))]
    if tuple(network.class_names) != names and not unnamed:
        raise DataError(
            f"{where} has the classes {network.class_names[:4]}… ({len(network.class_names)}), the data set has "
            f"{list(names[:4])}… ({len(names)}); they must be the same, in the same order"
        )
