"""Predictions that somebody made already, in the place of a network."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.answers.importing import Predictions, describe, import_predictions
from pipeline.answers.reading import find_predictions, names_of
from pipeline.answers.store import FOLDER, answers_of_split, is_imported, read_answers_manifest
from pipeline.data.decode import WHOLE
from pipeline.data.manifest import SPLITS, SplitName
from pipeline.data.readers.shard import Sample, Shard
from pipeline.errors import DataError, RunError, UsageError
from pipeline.pool.answered import StoredAnswers, StoredEmbeddings
from pipeline.pool.infer import Source
from pipeline.storage.files import fingerprint, location, read_at_most
from pipeline.storage.workers import EngineSettings
from pipeline.targets.embedding import Embedder
from stages.copies import Compared
from stages.options import Context
from stages.teachers.classes import OTHER_CLASSES, class_names, others_are_expected
from stages.teachers.teacher import Answered

MOST_BYTES = 64 << 20  # of a list of classes


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
                names = tuple(names_of(read_at_most(location(settings.predictions_classes), MOST_BYTES)))
            except (OSError, ValueError, RecursionError) as error:
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
        read = ["predictions", 1, files, list(self.names), settings.predictions_as]
        if self.predictions.names is not None:
            read.append(["classes", list(self.predictions.names)])
        if settings.predictions_in_order:
            read.append("in the data set's order")
        return fingerprint(read)

    def trouble(self) -> str:
        """Why answers/ does not hold what these predictions say of the images; empty if it does."""
        folder = self.context.store / FOLDER
        try:
            if read_answers_manifest(folder) is None:
                return f"{folder} has no manifest"
        except DataError as error:
            return str(error)
        for split, shards in self._shards().items():
            for shard in shards:
                if not is_imported(folder, split, shard, self.digest):
                    return f"{folder}: the answers about {split} images ({shard.name}) are missing, damaged or others"
        return ""

    def _shards(self) -> dict[str, tuple[Shard, ...]]:
        """Of each split that the data set has."""
        data = self.context.data_set
        return {name: data.split(name).shards for name in SPLITS if name in data.manifest.splits}

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
            if trouble := self.trouble():
                raise RunError(f"{trouble}; run mpl filter, which imports the predictions again")
            return
        manifest = import_predictions(
            self.context.store / FOLDER,
            self.context.run / ".answers.spill",
            self.predictions,
            self._shards(),
            self.digest,
            self.context.console.note,
        )
        tell_import(self.context, manifest)

    def source(self, engine: EngineSettings | None = None, batch: int | None = None) -> Source:
        size = self.context.recipe.data.image_size
        return StoredAnswers(self.context.store / FOLDER, self.names, size, batch or self.context.recipe.filter.batch)

    def embedder(self, engine: EngineSettings | None = None) -> Embedder:
        if not self._manifest.get("embedding"):
            raise UsageError(
                "precompute.embedding: the predictions have no column `embedding`; add it to the files and run mpl "
                "filter --force, or leave the setting out"
            )
        return StoredEmbeddings(self.context.store / FOLDER)

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
        "whose column `split` names another split than their image's": found.get("elsewhere", 0),
    }
    if any(lost.values()):
        context.console.note("; ".join(f"{count:,} {what}" for what, count in lost.items() if count))
    if found["unknown_answers"]:
        named = ", ".join(f"{name!r} {count:,} times" for name, count in list(found["unknown"].items())[:5])
        context.console.note(f"{found['unknown_answers']:,} answers name no class ({named}), and count as none")
