"""Small trainings to plan, and what a real step of them takes."""

from dataclasses import replace
from typing import Any

import numpy as np
from timm.models import register_model
from torch import Tensor, nn

from pipeline.config import CalibratorSettings, ModelSettings, OptimizerSettings
from pipeline.methods import parse_method
from pipeline.plan.footprint import Images
from pipeline.plan.needs import Needs
from pipeline.plan.predict import Layout
from pipeline.plan.step import PlannedMethod, Step, StepSettings, TeacherSettings
from pipeline.plan.tally import Tally, trace

__all__ = ["real_peak", "real_step", "training"]  # register_model appends to it


@register_model
def three_blocks(pretrained: bool = False, num_classes: int = 10, **others: Any) -> nn.Module:
    """Blocks of two convolutions with batch normalisation: cheap to run without data."""
    blocks = nn.Sequential(Block(3), Block(8), Block(8))
    return nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu())).relu()


SIZES = {"three_blocks": 8, "wrn_10_1": 8, "test_efficientnet": 32, "test_vit": 32}


def training(
    method: PlannedMethod, network: str = "three_blocks", teaching: str = "uda", rule: Any = "sgd", **changes: Any
) -> Needs:
    """One with 13 pool images, 9 labelled ones for feedback, and 7 for the teacher's method."""
    model, optimizer = ModelSettings(name=network), OptimizerSettings(rule=rule, lr=1e-4)
    reduced = method == "reduced"
    teacher = CalibratorSettings() if reduced else TeacherSettings(model, optimizer, parse_method(teaching))
    settings = replace(StepSettings(method, model, optimizer, SIZES[network], 10, None, teacher), **changes)
    return Needs(settings, Images(13, 9, 0 if reduced else 7, settings.lesson_pool), steps=100)


def real_step(needs: Needs, layout: Layout | None = None) -> tuple[Step, Any]:
    """A step on real tensors, and what takes it."""
    layout = layout or Layout(1, 1)
    step = Step(needs.settings, checkpointing=layout.checkpointing, micro_batches=layout.micro_batches)
    batch, labelled = step.batch(needs.images)
    return step, lambda **how: step.take(batch, labelled, **how)


def real_peak(needs: Needs, layout: Layout) -> int:
    """Most bytes of tensors alive at a time in the second real step; the first makes gradients and optimiser state."""
    with Tally() as tally:
        _, take = real_step(needs, layout)
        take()
        start = tally.events
        take()
        living: np.ndarray = trace(tally.pieces, [piece.size for piece in tally.pieces], tally.events)
    return int(living[start:].max())
