"""The rate that this machine reaches on a network: a few plain training steps."""

import os
import time
from dataclasses import replace

import torch

from pipeline.batches import TargetBatch
from pipeline.config import CalibratorSettings
from pipeline.plan.footprint import Images
from pipeline.plan.step import Step, StepSettings
from pipeline.plan.tally import Tally


def measured_flops(settings: StepSettings, device: torch.device, *, images: int = 32, steps: int = 3) -> float:
    """FLOP/s of plain steps of the student's network, the best of a few after one that warms up.

    Args:
        settings: whose student and optimiser.
        device: where.
        images: of a step.
        steps: that are timed.
    """
    step = Step(replace(settings, method="reduced", teacher=CalibratorSettings()), device=str(device))
    batch, _ = step.batch(Images(images, images), str(device))
    assert isinstance(batch, TargetBatch)

    def take() -> None:
        step.student.learn(batch.images, batch.distributions, replay=False)

    with Tally() as tally:
        take()
    seconds = []
    for _ in range(steps):
        _finish(device)
        began = time.perf_counter()
        take()
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return sum(flops * times for flops, times in tally.flops.items()) / min(seconds)


def device_memory(device: torch.device) -> int:
    """Bytes of the accelerator, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
