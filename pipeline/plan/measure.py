"""A step is run once without data for each way of taking it, and what it allocates and calculates is measured."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from pipeline.batches import Batch, Labelled, ViewBatch
from pipeline.errors import FeedbackError
from pipeline.plan.footprint import Footprint, Forms, measuring_images, read
from pipeline.plan.step import PlanError, Step, StepSettings
from pipeline.plan.tally import Tally

BLOCKED = (
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    NotImplementedError,
)


@cache
def footprint(settings: StepSettings, *, checkpointing: bool = False, halves: bool = False) -> Footprint | None:
    """Memory and operations of a step; None where the network has no derivative by the feedback's engine.

    Args:
        settings: what is trained.
        checkpointing: blocks are calculated again in the backward pass.
        halves: two micro-batches, which tell of any number above one.

    Raises:
        PlanError: an operation needs data.
    """
    step = Step(settings, checkpointing=checkpointing, micro_batches=1 + halves, device="meta")
    try:
        with fake_tensor.FakeTensorMode(), Tally() as tally:
            return _run(step, tally)
    except FeedbackError:
        return None
    except BLOCKED as error:
        raise PlanError(
            f"{settings.method} with {settings.student.name} has an operation that cannot be followed without data "
            f"({str(error).splitlines()[0]})"
        ) from error


def _run(step: Step, tally: Tally) -> Footprint:
    step.without_data()
    images = measuring_images(step.settings.lesson_pool)
    forms, (batch, labelled) = Forms(images), step.batch(images)
    step.pretend_taken()
    _label(step, tally, batch, labelled)
    _announce(step, tally)
    start = tally.events
    tally.flops.clear()
    step.take(batch, labelled)
    _label(step, tally, batch, labelled)  # the gradients are others now
    weights = {p.shape for network, _ in step.networks.values() for p in network.parameters() if p.ndim > 1}
    moments, phases = read(tally, forms, start, weights)
    flops = flops_without = forms.total(tally.flops)
    if step.settings.every > 1:
        tally.flops.clear()
        step.take(batch, labelled, feedback=False)
        flops_without = forms.total(tally.flops)
    return Footprint(moments, phases, flops, flops_without)


def _label(step: Step, tally: Tally, batch: Batch, labelled: Labelled) -> None:
    """Say what everything is that stands between two steps."""
    for name, (network, optimizer) in step.networks.items():
        gradients = [p.grad for p in network.parameters()]
        state = None if optimizer is None else list(optimizer.state.values())
        if name == "calibrator":
            tally.label("calibrator", _tensors([*network.parameters(), gradients, state]))
            continue
        tally.label("parameters", network.parameters(), divided=True)
        tally.label("parameters", network.buffers())
        tally.label("gradients", _tensors(gradients), divided=True)
        tally.label("optimiser", _tensors(state), divided=True)
    tally.label("EMA", step.average.parameters(), divided=True)
    tally.label("EMA", step.average.buffers())
    tally.label(
        "batch", _tensors([vars(batch), vars(labelled), vars(batch.views) if isinstance(batch, ViewBatch) else None])
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _announce(step: Step, tally: Tally) -> None:
    """Mark the phases of the step by hooks of its networks and optimisers."""
    updated = False

    def marks(phase: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            tally.mark(phase)

        mark.observes = True  # type: ignore[attr-defined]
        return mark

    def forward(*_: Any) -> None:
        training = torch.is_grad_enabled()
        if updated:
            tally.mark("labelled gradient" if training else "feedback" if step.settings.soft else "labelled loss")
        else:
            tally.mark("student's forward" if training else "labelled loss")

    def after_update(*_: Any) -> None:
        nonlocal updated
        updated = True

    after_update.observes = True  # type: ignore[attr-defined]
    for name, (network, optimizer) in step.networks.items():
        assert optimizer is not None
        network.register_forward_pre_hook(forward if name == "student" else marks(f"{name}'s forward"))
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(marks(f"{name}'s backward"))
        optimizer.register_step_pre_hook(marks(f"{name}'s update"))
    step.student.optimizer.register_step_post_hook(after_update)
