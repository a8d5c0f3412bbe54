"""A network as the teacher."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.answers.out_of_fold import OutOfFold, read_out_of_fold
from pipeline.data.manifest import SplitName
from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError, UsageError
from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.classes import order_or_assumed, with_classes_of
from pipeline.networks.folders import read_description
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, to_device
from pipeline.pool.features import NetworkFeatures
from pipeline.pool.infer import Scorer, Source, infer_distributions
from pipeline.storage.files import sha256_file
from pipeline.storage.workers import EngineSettings
from pipeline.targets.embedding import Embedder
from stages.copies import Compared
from stages.options import Context
from stages.teachers.classes import OTHER_CLASSES, class_names, others_are_expected, same_classes
from stages.teachers.teacher import Answered
from stages.workers import is_elsewhere


@dataclass(frozen=True)
class NetworkTeacher:
    """A network in timm's layout.

    Attributes:
        context: of the stage.
        folder: that holds it.
        engine: that will have it score the pool; None: this process.
        assume_class_order: a network that names no classes has the data set's, in their order.
    """

    context: Context
    folder: Path
    engine: EngineSettings | None = None
    assume_class_order: bool = False

    @property
    def is_own(self) -> bool:
        """Whether it is the run's own."""
        return self.folder == (self.context.run / "teacher").resolve()

    @cached_property
    def digest(self) -> str:
        if not (self.folder / WEIGHTS).is_file():
            load_network(self.folder)  # for its message
        return sha256_file(self.folder / WEIGHTS)

    @cached_property
    def order(self) -> list[int] | None:
        """The output that is each class of the data set; None: the network has classes of its own.

        Raises:
            DataError: its classes are others and nobody said how they become the data set's; or it names none.
        """
        about, ours = read_description(self.folder), class_names(self.context)
        outputs = about.arguments["num_classes"]
        if others_are_expected(self.context) and not same_classes(about.class_names, outputs, ours):
            return None
        where = f"teacher {self.folder}"
        try:
            return order_or_assumed(about.class_names, outputs, ours, where, self.assume_class_order)
        except DataError as error:
            if same_classes(about.class_names, outputs, ours):
                raise
            raise DataError(f"{error}. {OTHER_CLASSES}") from error

    @cached_property
    def names(self) -> tuple[str, ...]:
        if self.order is not None:
            return class_names(self.context)
        about = read_description(self.folder)
        return tuple(about.class_names or (f"output {place}" for place in range(about.arguments["num_classes"])))

    @property
    def basis(self) -> dict[str, Any]:
        order = self.order
        moved = order is not None and order != list(range(len(order)))
        return {
            "teacher": self.digest,
            "preprocessing": read_description(self.folder).preprocessing(),
            **({"classes": order} if moved else {}),
        }

    @property
    def compared(self) -> Compared:
        return Compared.of(self.folder)

    @property
    def told(self) -> dict[str, Any]:
        return {"teacher": self.context.run.told(self.folder), "assumed_class_order": self.assume_class_order}

    def at(self, context: Context) -> "NetworkTeacher":
        return replace(self, context=context)

    def check(self) -> None:
        self.network  # noqa: B018  (loads it)

    def begin(self) -> None:
        device_of(self.context, self.engine)  # before anything takes time
        self.network  # noqa: B018  (loads it)

    @cached_property
    def network(self) -> Network:
        """On its device unless workers will bring it there, with the data set's classes in order if it has them."""
        elsewhere = self.engine is not None and is_elsewhere(self.engine)
        network = load_network(self.folder)
        if self.order is None:
            network = replace(network, class_names=list(self.names), states_classes=True)
        else:
            names = class_names(self.context)
            network = with_classes_of(network, names, f"teacher {self.folder}", self.assume_class_order)
        to_device(network, torch.device("cpu") if elsewhere else self.context.device)
        network.model.eval()
        return network

    def source(self, engine: EngineSettings | None = None, batch: int | None = None) -> Source:
        return scorer(self.context, self.network, engine, batch)

    def embedder(self, engine: EngineSettings | None = None) -> Embedder:
        return NetworkFeatures(scorer(self.context, self.network, engine, self.context.recipe.precompute.batch))

    def answers(self, split: SplitName, samples: list[tuple[str, Sample]]) -> Answered:
        if split == "labelled" and (held_out := self.held_out) is not None:
            return held_out.of([(shard, sample.row) for shard, sample in samples])
        return infer_distributions([sample for _, sample in samples], self.source())

    @cached_property
    def held_out(self) -> OutOfFold | None:
        """What networks that were not trained on the labelled images say of them; None unless there are such."""
        return read_out_of_fold(self.folder) if self.is_own else None

    @property
    def saw_the_labelled_images(self) -> bool:
        return self.held_out is None if self.is_own else self.context.recipe.filter.seen_labels


def scorer(
    context: Context, network: Network, engine: EngineSettings | None = None, batch: int | None = None
) -> Scorer:
    """A network as the pool's scorer: here on its device, for workers elsewhere on the CPU until it gets there."""
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
