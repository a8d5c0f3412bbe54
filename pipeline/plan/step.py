"""A training step as `pipeline.training` takes it: with networks that have data, or that have none."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.batches import Batch, Labelled, TargetBatch, ViewBatch
from pipeline.checkpoints import Networks
from pipeline.config import (
    CalibratorSettings,
    FeedbackSettings,
    ModelSettings,
    MplFeedbackSettings,
    OptimizerSettings,
)
from pipeline.distributed import ALONE
from pipeline.distributed.blocks import blocks_of
from pipeline.distributed.layouts import Layout, lay_out
from pipeline.distributed.placement import Placement
from pipeline.errors import RecipeError, UserError
from pipeline.methods import Method, Views
from pipeline.networks.network import resolve
from pipeline.optim import average_with_warmup, build_optimizer
from pipeline.plan.footprint import Images
from pipeline.student import Student
from pipeline.teacher_network import TeacherNetwork, TeacherRule
from pipeline.teachers import Calibrator, Teacher, Wish
from pipeline.training import train_step

Engine = Literal["exact", "central", "one_sided"]
PlannedMethod = Literal["reduced", "mpl-soft", "mpl-hard"]


class PlanError(UserError):
    """A network cannot be planned for; says why."""


@dataclass(frozen=True)
class TeacherSettings:
    """A teacher network: which, its optimiser, and the method that makes its lesson."""

    model: ModelSettings
    optimizer: OptimizerSettings
    method: Method


@dataclass(frozen=True)
class StepSettings:
    """What is trained, and how.

    Attributes:
        method: which training.
        student, optimizer: the student's network.
        image_size: pixels.
        classes: C.
        precision: dtype of mixed precision (torch.bfloat16), or None for float32.
        teacher: a teacher network, or a calibrator.
        engine: of the feedback, where its gradient in the targets is asked for.
        every: steps between feedbacks.
    """

    method: PlannedMethod
    student: ModelSettings
    optimizer: OptimizerSettings
    image_size: int
    classes: int
    precision: torch.dtype | None
    teacher: TeacherSettings | CalibratorSettings
    engine: Engine = "exact"
    every: int = 1

    def __hash__(self) -> int:
        return hash(repr(self))  # a few of the settings are dicts

    @property
    def soft(self) -> bool:
        """Whether the gradient of the labelled loss in the targets is fed back."""
        return self.method != "mpl-hard"

    @property
    def views(self) -> frozenset[str]:
        """That the teacher's method works on."""
        return self.teacher.method.needs if isinstance(self.teacher, TeacherSettings) else frozenset()

    @property
    def lesson_pool(self) -> int:
        """How many times the pool's images are among those that a teacher network learns from.

        Its method takes the weak or the strong view; where that is not the student's view, the student's is appended.
        """
        if isinstance(self.teacher, CalibratorSettings):
            return 0
        return bool(self.views & {"pool", "pool_weak"}) + ("pool" not in self.views)


@dataclass(frozen=True)
class NetworkSize:
    """Trainable weights (their number); bytes of all weights, of buffers, and of the largest part that is gathered at
    a time where weights are divided: a block, or what is in none."""

    trainable: int
    weights: int
    buffers: int
    largest_block: int


class Step:
    """The objects of one training, and a step of it.

    Args:
        settings: what is trained.
        checkpointing: blocks are calculated again in the backward pass.
        micro_batches: parts in which a batch is taken.
        device: where the networks lie; on "meta" they have no data, and wait for `without_data`.
    """

    def __init__(
        self, settings: StepSettings, *, checkpointing: bool = False, micro_batches: int = 1, device: str = "cpu"
    ) -> None:
        self.settings = settings
        layout = Layout(checkpoint_activations=checkpointing)
        model = network(settings.student, settings, device)
        self.average = AveragedModel(model, multi_avg_fn=average_with_warmup(0.999), use_buffers=True)
        model = lay_out(model, layout, ALONE)
        self.student = Student(
            model,
            build_optimizer(model, settings.optimizer),
            clip_norm=settings.optimizer.clip_norm,
            autocast=settings.precision,
            micro_batches=micro_batches,
        )
        theirs = settings.teacher
        placement = Placement(torch.device(device), settings.precision, micro_batches=micro_batches)
        if isinstance(theirs, CalibratorSettings):
            options = FeedbackSettings(engine=settings.engine)
            self.teacher: Teacher[Any, Any] = Calibrator(settings.classes, theirs, options, placement)
            return
        model = lay_out(network(theirs.model, settings, device), layout, ALONE)
        rule = TeacherRule(
            theirs.method,
            "soft" if settings.soft else "hard",
            MplFeedbackSettings(engine=settings.engine),
            learning_rate=lambda step: theirs.optimizer.lr,
            clip_norm=theirs.optimizer.clip_norm,
        )
        self.teacher = TeacherNetwork(model, build_optimizer(model, theirs.optimizer), rule, placement)

    @property
    def networks(self) -> Networks:
        """All that are trained, with their optimisers: the student, and its teacher or calibrator."""
        return {"student": (self.student.module, self.student.optimizer), **self.teacher.networks()}

    def batch(self, images: Images, device: str = "cpu") -> tuple[Batch, Labelled]:
        """Noise, in the numbers and views that a step takes."""
        settings = self.settings

        def noise(n: int) -> Tensor:
            x = torch.randn(n, 3, settings.image_size, settings.image_size, device=device)
            return x.contiguous(memory_format=torch.channels_last)

        def distributions(n: int) -> Tensor:
            return torch.randn(n, settings.classes, device=device).softmax(1)

        labels = torch.randint(0, settings.classes, (images.feedback,), device=device)
        labelled = Labelled(noise(images.feedback), labels, distributions(images.feedback))
        pool, every = noise(images.pool), torch.ones(images.pool, dtype=torch.bool, device=device)
        if isinstance(settings.teacher, CalibratorSettings):
            return TargetBatch(pool, distributions(images.pool), every), labelled
        n = images.labelled
        partner = (noise(n), distributions(n)) if "partner" in settings.views else None
        weak = noise(images.pool) if "pool_weak" in settings.views else None
        views = Views(0, noise(n), distributions(n), partner, torch.zeros(n, device=device), pool, weak)
        return ViewBatch(pool, views), labelled

    def take(self, batch: Batch, labelled: Labelled, *, feedback: bool = True) -> None:
        """One step, with the moving average after it."""
        wish: Wish = self.teacher.wish(0) if feedback else "nothing"
        train_step(self.student, self.teacher, batch, None if wish == "nothing" else labelled, wish)
        self.average.update_parameters(self.student.module)

    def without_data(self) -> None:
        """Weights and buffers become fake tensors that say they are on the CPU, so that autocast and kernels are chosen
        as there. Call it within a FakeTensorMode."""
        for module, optimizer in [(self.average, None), *self.networks.values()]:
            fakes: dict[int, Any] = {}
            for m in module.modules():
                for tensors in (m._parameters, m._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            tensors[name] = fakes.setdefault(id(tensor), _fake(tensor))
            for group in [] if optimizer is None else optimizer.param_groups:
                group["params"] = [fakes[id(p)] for p in group["params"]]

    def pretend_taken(self) -> None:
        """Gradients and the optimisers' state stand, as after a step."""
        for module, optimizer in self.networks.values():
            for p in module.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            if optimizer is not None:
                optimizer.step()


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def network(model: ModelSettings, settings: StepSettings, device: str) -> nn.Module:
    """A fresh network in training mode.

    Raises:
        RecipeError: there is no such network.
        PlanError: it cannot be built without data.
    """
    name, arguments = resolve(model, settings.image_size)
    try:
        with torch.device(device):
            fresh: nn.Module = timm.create_model(name, num_classes=settings.classes, **arguments)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        if "meta" in str(error).lower():
            raise PlanError(
                f"{name} cannot be built on the meta device, so it cannot be planned for: {error}"
            ) from error
        raise RecipeError(f"cannot build model {name!r} with {arguments}: {error}") from error
    return fresh.to(memory_format=torch.channels_last).train()


@cache
def network_sizes(settings: StepSettings) -> dict[str, NetworkSize]:
    """Of the student's network, and of a teacher network."""
    models = {"student": settings.student}
    if isinstance(settings.teacher, TeacherSettings):
        models["teacher"] = settings.teacher.model
    return {name: _size(network(model, settings, "meta")) for name, model in models.items()}


def _size(fresh: nn.Module) -> NetworkSize:
    weights = sum(p.nbytes for p in fresh.parameters())
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(fresh)]
    return NetworkSize(
        trainable=sum(p.numel() for p in fresh.parameters() if p.requires_grad),
        weights=weights,
        buffers=sum(b.nbytes for b in fresh.buffers()),
        largest_block=max([*blocks, weights - sum(blocks)]),
    )
