"""What every training of a recipe is put together from: networks, image sets, the loop, and what is left of it.

The trainings themselves are `pipeline.trainings`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.batches import Batches, Composition, FeedbackImages, ImageSets
from pipeline.config import ModelSettings, Recipe, TrainSettings
from pipeline.correction import Correction
from pipeline.data.dataset import DataSet
from pipeline.data.decoded import Images
from pipeline.data.sets import LabelledSet, Pool
from pipeline.distributed.layouts import bare
from pipeline.distributed.placement import Placement
from pipeline.evaluate import Judge
from pipeline.networks.folders import CONFIG, save_network
from pipeline.networks.network import Network, build_network, require_classifier, to_device
from pipeline.networks.pretrained import pretrained_network
from pipeline.seeds import derive_seed
from pipeline.storage.files import sha256_file
from pipeline.storage.runs import peak_memory_mib
from pipeline.teachers import Teacher
from pipeline.training import Journal, Observer, Silent, Training


@dataclass(frozen=True)
class Output:
    """What a training leaves.

    Attributes:
        folder: gets the network, the log and, while it trains, checkpoints.
        identity: fingerprint of every setting and input that changes the result; checkpoints carry it.
    """

    folder: Path
    identity: str


@dataclass(frozen=True)
class Looks:
    """What is looked at while a training runs, beside the student's average on validation.

    Attributes:
        train_set: labelled images, unaugmented, for the accuracy on them.
        watched: further networks to judge, by a name for the log.
        watch: told how many steps are done.
    """

    train_set: Images | None = None
    watched: Mapping[str, nn.Module] = field(default_factory=dict)
    watch: Callable[[int], None] = lambda done: None


@dataclass(frozen=True)
class Assembly:
    """What the trainings of a recipe have in common.

    Attributes:
        recipe: all settings.
        seed: of everything that is drawn.
        data: images.
        placement: device, precision, processes.
        observer: told of progress.
    """

    recipe: Recipe
    seed: int
    data: DataSet
    placement: Placement = Placement()
    observer: Observer = Silent()

    def seed_initialisation(self, purpose: str) -> None:
        """Seed torch's default generator for the initial weights of one network."""
        torch.manual_seed(derive_seed(self.seed, "initialisation", purpose))

    def network(self, settings: ModelSettings, class_names: tuple[str, ...], purpose: str) -> Network:
        """A fresh network on its device; the same initial weights for every method of a seed."""
        data = self.recipe.data
        self.seed_initialisation(purpose)
        if settings.pretrained:
            network = pretrained_network(settings, class_names, data.image_size)
        else:
            network = build_network(settings, class_names, data.image_size, data.mean, data.std)
        require_classifier(network, settings.name)
        return to_device(network, self.placement.device)

    def batches(
        self,
        network: Network,
        labelled: LabelledSet,
        composition: Composition,
        pool: Pool | None = None,
        feedback: FeedbackImages = FeedbackImages(),
        label_noise: float = 0.0,
        correction: Correction | None = None,
        embedding: int = 0,
    ) -> Batches:
        """Batches normalised for a network; see `pipeline.batches`."""
        sets = ImageSets(labelled, pool, network.mean, network.std, label_noise, correction, embedding)
        return Batches(sets, composition, feedback, seed=self.seed, placement=self.placement)

    def judge(self, images: Images, network: Network) -> Judge:
        """Judges networks of this kind on these images."""
        settings, placement = self.recipe.evaluate, self.placement
        return Judge(images, network, settings, placement.device, placement.autocast, placement.ranks)

    def validation_judge(self, network: Network) -> Judge | None:
        """Judges on the validation split; None where the data set has none."""
        if "validation" not in self.data.manifest.splits:
            return None
        return self.judge(self.data.images(self.data.split("validation"), network.image_size, network.framing), network)

    def train(
        self,
        network: Network,
        teacher: Teacher[Any, Any],
        batches: Batches,
        settings: TrainSettings,
        output: Output,
        looks: Looks = Looks(),
    ) -> dict[str, Any]:
        """Train `network` under `teacher`; leave its moving average in the output's folder, in timm's layout.

        The validation split, if there is one, is looked at for the log and the record; nothing is chosen by it here.

        Returns:
            Figures for a record: steps, seconds, memory, accuracy on validation (or None), digest of the weights.
        """
        judge, ranks = self.validation_judge(network), self.placement.ranks
        figures_of = log_figures(judge, looks) if judge else lambda model: {}
        journal = Journal(output.folder, output.identity, self.observer, figures_of, looks.watch)
        training = Training(
            network.model, teacher, batches, settings, journal, seed=self.seed, placement=self.placement
        )
        figures = training.run()
        state = training.averaged_state()
        digest = save_network(output.folder, network, state) if ranks.first else ""
        evaluation = judge(training.average.module).as_json(network.class_names) if judge else None
        return figures | {
            "checkpoint": "last step, moving average",
            "weights_sha256": digest,
            **({"config_sha256": sha256_file(output.folder / CONFIG)} if ranks.first else {}),
            "validation": evaluation,
            "train_peak_memory_mib": round(peak_memory_mib(), 1),
        }

    def tell_feedback_batch(self, batches: Batches) -> None:
        """A note where the processes do not divide the labelled images that give feedback."""
        wanted = min(batches.feedback_images.batch, len(batches.feedback_labelled))
        if batches.feedback_batch < wanted:
            self.observer.note(
                f"feedback is measured on {batches.feedback_batch} labelled images a step instead of {wanted}, "
                f"which the {self.placement.ranks.world} processes do not divide"
            )


def log_figures(judge: Judge, looks: Looks) -> Callable[[nn.Module], dict[str, float]]:
    """What a network's row in the log says: accuracy and likelihood on validation, and of what else is looked at."""

    def figures(model: nn.Module) -> dict[str, float]:
        evaluation = judge(model)
        row = {"validation_top1": evaluation.top1, "validation_nll": evaluation.nll}
        if looks.train_set is not None:
            on_train = replace(judge, images=looks.train_set)
            row["train_top1"] = on_train(model).top1
            for name, other in ((name, bare(network)) for name, network in looks.watched.items()):
                row[f"{name}_validation_top1"] = judge(other).top1
                row[f"{name}_train_top1"] = on_train(other).top1
        return row

    return figures
