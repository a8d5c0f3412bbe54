"""Whose answers the pool stages store: a network's, or predictions that somebody made already."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.answers.importing import Predictions, describe, import_predictions
from pipeline.answers.out_of_fold import OutOfFold, read_out_of_fold
from pipeline.answers.reading import find_predictions, names_of
from pipeline.answers.store import FOLDER, answers_of_split, read_answers_manifest
from pipeline.classes import same_names
from pipeline.correction import ClassMap, Correction, Fit, class_map_of, fit_correction, fit_scaling
from pipeline.data.decode import WHOLE
from pipeline.data.manifest import SplitName
from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError, RunError, UsageError
from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.classes import order_or_assumed, with_classes_of
from pipeline.networks.folders import read_description
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, to_device
from pipeline.pool.answered import StoredAnswers
from pipeline.pool.infer import Scorer, Source, infer_distributions
from pipeline.storage.files import fingerprint, location, opened, sha256_file
from pipeline.storage.workers import EngineSettings
from stages.copies import Compared
from stages.networks import network_folder
from stages.options import Context
from stages.workers import is_elsewhere

Answered = tuple[NDArray[np.floating[Any]], NDArray[np.intp]]
"""Distributions (m, C_T) of some of n images, and their places among them, (m,)."""


class Teacher(Protocol):
    """What the pool stages need of a teacher.

    Attributes:
        digest: of all that its answers depend on but how images are shown to it.
        names: of its classes, C_T; the data set's, in their order, where they are the same.
        basis: what scores depend on, for a record.
        compared: how images are looked at for copies.
        told: for the record: where it is.
        saw_the_labelled_images: whether it was trained on them, so that what it says of them is no evidence.
    """

    @property
    def digest(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def basis(self) -> dict[str, Any]: ...
    @property
    def compared(self) -> Compared: ...
    @property
    def told(self) -> dict[str, Any]: ...
    @property
    def saw_the_labelled_images(self) -> bool: ...

    def at(self, context: Context) -> "Teacher":
        """The same in another context: of another precision."""
        ...

    def check(self) -> None:
        """Raise what would keep it from answering, before anything is removed."""
        ...

    def begin(self) -> None:
        """Whatever must be there before its answers are: it is loaded, or its predictions are imported."""
        ...

    def source(self, engine: EngineSettings | None = None, batch: int | None = None) -> Source:
        """Of its answers to the pool; here, or for an engine's workers."""
        ...

    def answers(self, split: SplitName, samples: list[tuple[str, Sample]]) -> Answered:
        """Of its answers to labelled and evaluation images."""
        ...


# --- a network ------------------------------------------------------------------------------------------------


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


# --- predictions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictionsTeacher:
    """Predictions in files, as the recipe's `filter` section names them.

    Attributes:
        context: of the stage.
        recorded: the record of the `mpl filter` that imported them: the files themselves are not needed any more.
    """

    context: Context
    recorded: dict[str, Any] | None = None

    @cached_property
    def predictions(self) -> Predictions:
        """The files, looked up now.

        Raises:
            DataError: there is none, or the list of classes cannot be read.
        """
        settings = self.context.recipe.filter
        names = None
        if settings.predictions_classes is not None:
            try:
                with opened(location(settings.predictions_classes)) as file:
                    names = tuple(names_of(file.read()))
            except (OSError, ValueError) as error:
                raise DataError(f"--classes {settings.predictions_classes} cannot be read: {error}") from error
        return Predictions(
            teachers=tuple(tuple(find_predictions(stated)) for stated in settings.predictions),
            form=settings.predictions_as,
            names=names,
            class_names=class_names(self.context),
            in_order=settings.predictions_in_order,
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        if self.recorded is not None:
            return tuple(self._manifest["class_names"])
        found = describe(self.predictions)
        if found != class_names(self.context) and not others_are_expected(self.context):
            ours = class_names(self.context)
            raise DataError(
                f"the predictions have {len(found):,} classes ({', '.join(found[:5])}, …), and the data set "
                f"{len(ours):,} ({', '.join(ours[:5])}, …). {OTHER_CLASSES}"
            )
        return found

    @property
    def _manifest(self) -> dict[str, Any]:
        """Of the answers that were imported.

        Raises:
            RunError: they are gone.
        """
        found = read_answers_manifest(self.context.store / FOLDER)
        if found is None:
            raise RunError(f"{self.context.store / FOLDER} does not hold the answers any more; run mpl filter --force")
        return found

    @cached_property
    def digest(self) -> str:
        if self.recorded is not None:
            return str(self.recorded["teacher_sha256"])
        settings = self.context.recipe.filter
        files = [[file.fingerprint() for file in files] for files in self.predictions.teachers]
        return fingerprint(["predictions", 1, files, list(self.names), settings.predictions_as])

    @property
    def basis(self) -> dict[str, Any]:
        return {"teacher": self.digest, "preprocessing": {"image_size": self.context.recipe.data.image_size}}

    @property
    def compared(self) -> Compared:
        return Compared(min(64, self.context.recipe.data.image_size), WHOLE)

    @property
    def told(self) -> dict[str, Any]:
        return {"teacher": None, "predictions": list(self.context.recipe.filter.predictions)}

    @property
    def saw_the_labelled_images(self) -> bool:
        return self.context.recipe.filter.seen_labels

    def at(self, context: Context) -> "PredictionsTeacher":
        return replace(self, context=context)

    def check(self) -> None:
        self.digest  # noqa: B018  (looks at every file)

    def begin(self) -> None:
        if self.recorded is not None:
            return
        data = self.context.data_set
        present: tuple[SplitName, ...] = ("unlabelled", "labelled", "validation", "test")
        shards = {str(name): data.split(name).shards for name in present if name in data.manifest.splits}
        folder = self.context.store / FOLDER
        manifest = import_predictions(
            folder,
            self.context.run / ".answers.spill",
            self.predictions,
            shards,
            self.digest,
            self.context.console.note,
        )
        tell_import(self.context, manifest)

    def source(self, engine: EngineSettings | None = None, batch: int | None = None) -> Source:
        size = self.context.recipe.data.image_size
        return StoredAnswers(self.context.store / FOLDER, self.names, size, batch or self.context.recipe.filter.batch)

    def answers(self, split: SplitName, samples: list[tuple[str, Sample]]) -> Answered:
        identities = [(shard, sample.row) for shard, sample in samples]
        return answers_of_split(self.context.store / FOLDER, split, identities, len(self.names))

    @property
    def counts(self) -> dict[str, Any]:
        """What became of the rows, for the record."""
        return {
            name: value
            for name, value in self._manifest.items()
            if name not in ("shards", "class_names", "content_sha256")
        }


def tell_import(context: Context, found: dict[str, Any]) -> None:
    """What became of the rows, for a person."""
    splits = ", ".join(f"{found['answered'][name]:,} of {count:,} {name}" for name, count in found["images"].items())
    context.console.note(f"{found['rows']:,} answers read ({', '.join(found['forms'])}); they answer {splits} images")
    lost = {
        "of no image": found["unmatched"],
        "whose key is that of several images (a column `split`, or shard and row, tell them apart)": found["ambiguous"],
        "without an answer": found["empty"],
        "said twice": found["doubled"],
    }
    if any(lost.values()):
        context.console.note("; ".join(f"{count:,} {what}" for what, count in lost.items() if count))
    if found["unknown_answers"]:
        named = ", ".join(f"{name!r} {count:,} times" for name, count in list(found["unknown"].items())[:5])
        context.console.note(f"{found['unknown_answers']:,} answers name no class ({named}), and count as none")


# --- which, and how its classes become ours -------------------------------------------------------------------

OTHER_CLASSES = (
    "A teacher with classes of its own becomes one of yours by a map of classes (--class-map FILE; --correction map "
    "for equal names) or by a fit to the labelled images (--correction fit)"
)


def class_names(context: Context) -> tuple[str, ...]:
    """Of the data set."""
    return context.data_set.split("labelled").class_names


def others_are_expected(context: Context) -> bool:
    """Whether somebody said how other classes become the data set's."""
    settings = context.recipe.filter
    return settings.correction in ("map", "scaling", "fit") or settings.class_map is not None


def same_classes(stated: list[str] | tuple[str, ...] | None, outputs: int, ours: tuple[str, ...]) -> bool:
    """Whether a network's classes can be the data set's: by name, or where it names none by their number."""
    return outputs == len(ours) if stated is None else same_names(stated, ours)


def teacher_folder(context: Context, teacher: Path | None) -> Path:
    """The network to use: the one given, else the one that this run's pool was scored with, else teacher/."""
    if teacher is not None:
        return teacher.resolve()
    known = context.run.record("filter")
    if known is None and context.recipe.filter.teacher is not None:
        return network_folder(context, Path(context.recipe.filter.teacher))
    return context.run.place("teacher" if known is None else known["result"]["teacher"] or "teacher")


def teacher_of(
    context: Context,
    teacher: Path | None,
    engine: EngineSettings | None = None,
    assume_class_order: bool = False,
    recorded: dict[str, Any] | None = None,
) -> Teacher:
    """The predictions that the recipe names, unless a network is given; else a network.

    `recorded` is what `mpl filter` recorded, for stages after it.
    """
    if teacher is None and recorded is not None and recorded["teacher"] is None:
        return PredictionsTeacher(context, recorded)
    if teacher is None and recorded is None and context.recipe.filter.predictions:
        return PredictionsTeacher(context)
    folder = teacher_folder(context, teacher)
    if folder == (context.run / "teacher").resolve():
        context.run.require("pretrain", "mpl pretrain")
    return NetworkTeacher(context, folder, engine, assume_class_order)


def correction_of(context: Context, teacher: Teacher) -> Correction | Fit:
    """What makes the data set's classes of the teacher's, as the recipe says.

    Raises:
        DataError: a map that leaves one of the data set's classes without any, or no labelled image has an answer.
        UsageError: `identity` for a teacher with classes of its own.
    """
    settings, ours, theirs = context.recipe.filter, class_names(context), teacher.names
    kind = settings.correction
    if kind == "auto":
        kind = "map" if settings.class_map is not None else "identity"
    if kind == "identity":
        if ours != theirs:
            raise UsageError(f"--correction identity is for a teacher with the data set's classes. {OTHER_CLASSES}")
        return Correction.identity(ours)
    mapped = class_map(context, teacher)
    if kind == "map":
        assert mapped is not None
        return Correction.mapped(theirs, ours, mapped)
    q, labels = labelled_answers(context, teacher, "labelled")
    if kind == "scaling":
        return fit_scaling(q, labels, theirs, ours, mapped)
    return fit_correction(q, labels, theirs, ours, mapped, seed=context.seed)


def require_evidence(teacher: Teacher) -> None:
    """Refuse a fit to what a teacher says of images that it knows by heart.

    Raises:
        UsageError: it was trained on them: says so, or is the run's own without held-out answers.
    """
    if not teacher.saw_the_labelled_images:
        return
    if isinstance(teacher, NetworkTeacher) and teacher.is_own:
        raise UsageError(
            "the run's own teacher was trained on the labelled images: certain and right on them, it gives a fit "
            "nothing to correct. Train it with held-out answers: mpl pretrain --force --set pretrain.folds=5"
        )
    raise UsageError(
        "the teacher was trained on the labelled images (--seen-labels): certain and right on them, it gives a fit "
        "nothing to correct. Use a map of classes, or answers of a teacher that has not seen them (--held-out-labels)"
    )


def class_map(context: Context, teacher: Teacher) -> ClassMap | None:
    """The map of the teacher's classes that the recipe names, or of equal names; see `class_map_of`."""
    settings = context.recipe.filter
    path = None if settings.class_map is None else Path(settings.class_map)
    if settings.correction in ("scaling", "fit") and path is None and teacher.names == class_names(context):
        return None  # it starts at the identity
    return class_map_of(path, teacher.names, class_names(context), complete=settings.correction != "fit")


def labelled_answers(
    context: Context, teacher: Teacher, split: SplitName
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
    """The teacher's distributions of the images of a split that have one, (m, C_T), and their labels, (m,).

    Raises:
        RunError: none has.
    """
    samples = list(context.data_set.split(split).read())
    q, places = teacher.answers(split, samples)
    if not len(places):
        raise RunError(f"the teacher has no answer about any of the {len(samples):,} {split} images")
    return q, np.array([samples[place][1].label for place in places.tolist()], np.int64)


def tell_fit(context: Context, fit: Fit) -> None:
    """How a correction was fitted, for a person."""
    text = f"the correction was fitted to {fit.images:,} labelled images, strength {fit.strength:.3g}"
    if len(fit.nll) > 1:
        text += f" (NLL of those left out {min(fit.nll):.3f}, where it is strongest {fit.nll[0]:.3f})"
    context.console.note(text)
    if fit.absent:
        context.console.note(f"no labelled image is of {', '.join(fit.absent[:10])}: there the fit knows nothing")
