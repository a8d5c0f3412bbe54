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
from pipeline.models import Network


@dataclass(frozen=True)
class Evaluation:
    """Figures of one network on one split.

    Attributes:
        images: number of images judged.
        top1, top5: accuracy, percent (top5 is top-C where there are fewer than five classes).
        nll: mean negative log-likelihood, nats.
        ece: expected calibration error of the top prediction, percent, over equal-width bins.
        per_class: accuracy of each class, percent; None for a class without images.
    """

    images: int
    top1: float
    top5: float
    nll: float
    ece: float
    per_class: list[float | None]

    def as_json(self, class_names: list[str]) -> dict[str, Any]:
        """For evaluation.json, figures rounded to what they mean."""
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
    """Judge logits (N, C) against labels (N,)."""
    n, classes = logits.shape
    log_p = F.log_softmax(logits.double(), dim=1)
    confidence, predicted = log_p.exp().max(dim=1)
    right = (predicted == labels).double()
    top5 = (log_p.topk(min(5, classes), dim=1).indices == labels[:, None]).any(dim=1)
    counts = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels, weights=right, minlength=classes)
    return Evaluation(
        images=n,
        top1=100 * float(right.mean()),
        top5=100 * float(top5.double().mean()),
        nll=float(F.nll_loss(log_p, labels)),
        ece=100 * calibration_error(confidence, right, bins),
        per_class=[100 * float(h / c) if c else None for h, c in zip(hits, counts, strict=True)],
    )


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
