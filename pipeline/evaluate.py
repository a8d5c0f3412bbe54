"""How good a network is on labelled images: accuracy, likelihood, calibration."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import EvaluateSettings
from pipeline.data.augment.augment import normalize
from pipeline.data.decoded import Images
from pipeline.distributed import ALONE, Ranks
from pipeline.errors import DataError
from pipeline.networks.features import last_layer_seen
from pipeline.networks.network import Network


@dataclass(frozen=True)
class Evaluation:
    """Figures of one network on one split.

    Attributes:
        images: number of images judged.
        top1, top5: accuracy, percent (top5 is top-C where there are fewer than five classes).
        nll: mean negative log-likelihood, nats.
        ece: expected calibration error of the top prediction, percent, over equal-width bins.
        per_class: accuracy of each class, percent; None for a class without images.
        confusion: images of each class (rows) that were taken for each class (columns), int64, (C, C).
    """

    images: int
    top1: float
    top5: float
    nll: float
    ece: float
    per_class: list[float | None]
    confusion: Tensor

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent class, percent."""
        return 100 * int(self.confusion.sum(dim=1).max()) / self.images

    def whole_json(self, class_names: list[str]) -> dict[str, Any]:
        """For evaluation.json: `as_json` with 95% intervals (Wilson), the majority's accuracy, and who was taken for
        whom: class → class → images, without those that are 0."""
        counts, hits = self.confusion.sum(dim=1), self.confusion.diagonal()
        taken = [{class_names[int(j)]: int(row[j]) for j in row.nonzero()[:, 0]} for row in self.confusion]
        return self.as_json(class_names) | {
            "top1_interval": interval(int(hits.sum()), self.images),
            "majority": round(self.majority, 4),
            "images_per_class": dict(zip(class_names, counts.tolist(), strict=True)),
            "per_class_interval": {
                name: interval(int(h), int(n)) for name, h, n in zip(class_names, hits, counts, strict=True)
            },
            "confusion": dict(zip(class_names, taken, strict=True)),
        }

    def as_json(self, class_names: list[str]) -> dict[str, Any]:
        """Figures rounded to what they mean."""
        return {
            "images": self.images,
            "top1": round(self.top1, 4),
            "top5": round(self.top5, 4),
            "nll": round(self.nll, 6),
            "ece": round(self.ece, 4),
            "per_class": {
                name: None if value is None else round(value, 4)
                for name, value in zip(class_names, self.per_class, strict=True)
            },
        }


def shares(n: int, parts: int) -> list[slice]:
    """Runs of one length that cover n rows: a sharded network takes as many batches on every rank; the last overlap."""
    size = -(-n // parts)
    return [slice(first, first + size) for first in (min(part * size, n - size) for part in range(parts))]


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    pixels: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    batch: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Logits of un-augmented images, in evaluation mode.

    Args:
        model: left in the mode it was in.
        pixels: uint8, (N, 3, S, S), on any device.
        mean, std: of the normalisation.
        batch: images at a time.
        device: where the model is.
        autocast: dtype of mixed precision, or None.
        ranks: processes that have the same images and network (a sharded one: their part of it), and share the work.

    Returns:
        float32, (N, C), on the CPU; on every rank.
    """
    runs = shares(len(pixels), ranks.world)
    training = model.training
    model.eval()
    try:
        batches = []
        for chunk in pixels[runs[ranks.rank]].split(batch):
            images = normalize(chunk.to(device).float() / 255, mean, std)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                batches.append(model(images).float().cpu())
        own = torch.cat(batches)
        if ranks.world == 1:
            return own
        whole = own.new_empty(len(pixels), own.shape[1])
        for rows, logits in zip(runs, ranks.gathered(own), strict=True):
            whole[rows] = logits
        return whole
    finally:
        model.train(training)


def evaluate_logits(logits: Tensor, labels: Tensor, bins: int = 15) -> Evaluation:
    """Judge logits (N, C) against labels (N,).

    Raises:
        DataError: logits are not finite: nothing can be said of such a network.
    """
    n, classes = logits.shape
    if bad := int((~logits.isfinite().all(dim=1)).sum()):
        raise DataError(
            f"the network's logits are not finite for {bad:,} of {n:,} images: its weights are broken, or its "
            "precision is too low. Train it again with a lower learning rate, or judge it with --precision float32"
        )
    log_p = F.log_softmax(logits.double(), dim=1)
    confidence, predicted = log_p.exp().max(dim=1)
    right = (predicted == labels).double()
    top5 = (log_p.topk(min(5, classes), dim=1).indices == labels[:, None]).any(dim=1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    counts, hits = confusion.sum(dim=1), confusion.diagonal()
    return Evaluation(
        images=n,
        top1=100 * float(right.mean()),
        top5=100 * float(top5.double().mean()),
        nll=float(F.nll_loss(log_p, labels)),
        ece=100 * calibration_error(confidence, right, bins),
        per_class=[100 * int(h) / int(c) if c else None for h, c in zip(hits, counts, strict=True)],
        confusion=confusion,
    )


def interval(hits: int, count: int) -> list[float] | None:
    """95% interval of an accuracy, percent (Wilson 1927); None without images."""
    from scipy.stats import binomtest

    if not count:
        return None
    found = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return [round(100 * float(found.low), 2), round(100 * float(found.high), 2)]


def calibration_error(confidence: Tensor, right: Tensor, bins: int) -> float:
    """Σ over bins of (share of images) · |accuracy − mean confidence|; bins are (a, b], as in Guo et al. 2017."""
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)  # (N,)
    gaps = torch.zeros(bins, dtype=torch.double).index_add_(0, index, right - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


@dataclass(frozen=True)
class Judge:
    """Evaluates networks on images held in memory.

    Attributes:
        images: with labels.
        network: the kind of network: its size and normalisation.
        settings: batch size, bins.
        device: where networks lie.
        autocast: dtype of mixed precision, or None.
        ranks: the processes that share the work.
    """

    images: Images
    network: Network
    settings: EvaluateSettings
    device: torch.device
    autocast: torch.dtype | None = None
    ranks: Ranks = ALONE

    def __call__(self, model: nn.Module) -> Evaluation:
        return evaluate_logits(self.logits(model), self.images.labels, self.settings.bins)

    def probabilities(self, model: nn.Module) -> Tensor:
        """Of each image, float32 (N, C)."""
        return self.logits(model).softmax(dim=1)

    def features(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (N, C), and what the network's last linear layer sees, (N, D).

        Raises:
            DataError: the network has no linear layer.
        """
        with last_layer_seen(model) as seen:
            logits = self.logits(model)
        return logits, torch.cat(seen)

    def logits(self, model: nn.Module) -> Tensor:
        """Of each image, (N, C)."""
        return predict_logits(
            model,
            self.images.images,
            self.network.mean,
            self.network.std,
            batch=self.settings.batch,
            device=self.device,
            autocast=self.autocast,
            ranks=self.ranks,
        )
