"""The rate that this machine reaches on a network: a few plain training steps."""

import time

import timm
import torch

from pipeline.models import resolve
from pipeline.optim import build_optimizer
from pipeline.plan.needs import Needs
from pipeline.student import Student


def measured_flops(needs: Needs, device: torch.device, *, images: int = 32, steps: int = 3) -> float:
    """FLOP/s of plain steps of the student's network, the best of a few after one that warms up.

    Args:
        needs: whose student and optimiser.
        device: where.
        images: of a step.
        steps: that are timed.
    """
    costs = needs.student
    name, arguments = resolve(costs.settings, costs.image_size)
    model = timm.create_model(name, num_classes=costs.classes, **arguments)
    model.to(device=device, memory_format=torch.channels_last).train()
    student = Student(model, build_optimizer(model, needs.optimizer), autocast=costs.precision)
    batch = costs.images(images).normal_().to(device)
    targets = torch.full((images, costs.classes), 1 / costs.classes, device=device)
    seconds = []
    for _ in range(steps + 1):
        _finish(device)
        began = time.perf_counter()
        student.learn(batch, targets, replay=False)
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return costs.training.flops(images) / min(seconds[1:])


def device_memory(device: torch.device) -> int:
    """Bytes of the accelerator, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
