"""What one network costs: weights, optimiser state, and every kind of pass of a training step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

from pipeline.config import ModelSettings, OptimizerSettings
from pipeline.distributed.blocks import blocks_of, checkpoint_block
from pipeline.errors import FeedbackError, RecipeError
from pipeline.gradient.derivative import forward_mode
from pipeline.gradient.labelled_loss import labelled_loss_gradient
from pipeline.gradient.replay import Replay, Tensors, log_probabilities
from pipeline.models import resolve
from pipeline.plan.live import LiveBytes, Pass, PlanError, follow


@dataclass(frozen=True)
class Costs:
    """A network as a plan sees it.

    Attributes:
        settings: which network.
        image_size: pixels.
        classes: C.
        precision: dtype of mixed precision (torch.bfloat16), or None for float32.
    """

    settings: ModelSettings
    image_size: int
    classes: int
    precision: torch.dtype | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The network without data, in training mode.

        Raises:
            RecipeError: there is no such network.
            PlanError: it cannot be built without data.
        """
        name, arguments = resolve(self.settings, self.image_size)
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=self.classes, **arguments)
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            if "meta" in str(error).lower():
                raise PlanError(
                    f"{name} cannot be built on the meta device, so it cannot be planned for: {error}"
                ) from error
            raise RecipeError(f"cannot build model {name!r} with {arguments}: {error}") from error
        with self._mode:
            return _without_data(model).train()

    @cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode()

    @property
    def parameters(self) -> int:
        """Trainable weights, number."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def parameter_bytes(self) -> int:
        """Weights."""
        return sum(_bytes(p) for p in self.model.parameters())

    @cached_property
    def buffer_bytes(self) -> int:
        """Running statistics and other buffers."""
        return sum(_bytes(b) for b in self.model.buffers())

    @cached_property
    def largest_block_bytes(self) -> int:
        """The largest part that is gathered at a time where weights are divided: a block, or what is in none."""
        inside = [sum(_bytes(p) for p in block.parameters()) for block in blocks_of(self.model)]
        return max([*inside, self.parameter_bytes - sum(inside)])

    def optimizer_bytes(self, settings: OptimizerSettings) -> int:
        """State of the optimiser after its first step."""
        tensors = [p for p in self.model.parameters() if p.requires_grad]
        whole, counters = sum(map(_bytes, tensors)), 4 * len(tensors)
        momentum = whole if settings.momentum else 0
        match settings.rule:
            case "sgd" | "nesterov":
                return momentum
            case "rmsprop" | "rmsprop_tf":
                return whole + momentum + counters
            case "adamw":
                return 2 * whole + counters

    def derivative_bytes(self, settings: OptimizerSettings) -> int:
        """D of `pipeline.optim`: one number for SGD, else a number for each weight."""
        return 0 if settings.rule in ("sgd", "nesterov") else self.parameter_bytes

    @cached_property
    def training(self) -> Pass:
        """Forward and backward on soft targets."""
        return self._follow(partial(_train, self), "forward and backward")

    @cached_property
    def checkpointed(self) -> Pass:
        """The same, where each block keeps its input alone and is calculated again in the backward pass."""
        with checkpointing(self.model):
            return self._follow(partial(_train, self), "forward and backward with activation checkpointing")

    @cached_property
    def labelled(self) -> Pass:
        """∇R on labelled images; the same with checkpointing is `labelled_checkpointed`."""
        return self._follow(partial(_labelled, self), "the labelled loss")

    @cached_property
    def labelled_checkpointed(self) -> Pass:
        """∇R with activation checkpointing."""
        with checkpointing(self.model):
            return self._follow(partial(_labelled, self), "the labelled loss with activation checkpointing")

    @cached_property
    def forward(self) -> Pass:
        """Forward in training mode, without a gradient."""
        return self._follow(partial(_forward, self), "forward")

    @cached_property
    def forward_mode(self) -> Pass | None:
        """The forward-mode pass of exact feedback; None where an operation has no such derivative."""
        try:
            return self._follow(_forward_mode, "the forward-mode pass", self._replay)
        except FeedbackError:
            return None

    def saved_bytes(self, images: int, *, checkpointed: bool = False) -> int:
        """What the forward pass keeps for the backward pass, without weights and buffers."""
        model = self.model
        with self._mode, checkpointing(model) if checkpointed else nullcontext():
            x = self.images(images)
            return saved_bytes(model, lambda: log_probabilities(model, x, self.precision))

    def images(self, n: int) -> Tensor:
        """(n, 3, S, S), float32, channels last as in training."""
        size = self.image_size
        return torch.empty(n, 3, size, size).contiguous(memory_format=torch.channels_last)

    def _replay(self, n: int) -> tuple[Replay, Tensors]:
        """A recorded step and a direction."""
        model = self.model
        weights = {name: p.detach() for name, p in model.named_parameters()}
        replay = Replay(
            module=model,
            parameters=weights,
            buffers={name: b.detach() for name, b in model.named_buffers()},
            modes={name: m.training for name, m in model.named_modules()},
            images=self.images(n),
            rng=(torch.default_generator.get_state(), None),
            autocast=self.precision,
        )
        return replay, {name: torch.empty_like(p) for name, p in weights.items()}

    def _follow(
        self, run: Callable[[Any, LiveBytes], Iterable[Tensor]], what: str, prepare: Callable[[int], Any] | None = None
    ) -> Pass:
        try:
            model = self.model
            with self._mode:
                return follow(prepare or self.images, run, f"{type(model).__name__}: {what}")
        except (UnsupportedOperatorException, NotImplementedError) as error:
            raise PlanError(
                f"{self.settings.name}: {what} has an operation that cannot be followed without data "
                f"({str(error).splitlines()[0]})"
            ) from error


# --- the passes, by the functions that training itself calls --------------------------------------------


def _train(costs: Costs, images: Tensor, live: LiveBytes) -> list[Tensor]:
    log_p = log_probabilities(costs.model, images, costs.precision)
    loss = -(torch.empty_like(log_p) * log_p).sum(dim=1).mean()
    live.turn()
    gradients = torch.autograd.grad(loss, [p for p in costs.model.parameters() if p.requires_grad], allow_unused=True)
    return [g for g in gradients if g is not None]


def _labelled(costs: Costs, images: Tensor, live: LiveBytes) -> list[Tensor]:
    labels = torch.empty(len(images), dtype=torch.int64)
    return list(labelled_loss_gradient(costs.model, images, labels, costs.precision)[1].values())


@torch.no_grad()
def _forward(costs: Costs, images: Tensor, live: LiveBytes) -> list[Tensor]:
    log_probabilities(costs.model, images, costs.precision)
    return []


def _forward_mode(inputs: tuple[Replay, Tensors], live: LiveBytes) -> list[Tensor]:
    forward_mode(*inputs)
    return []


# --- networks without data -------------------------------------------------------------------------------


def _without_data(model: nn.Module) -> nn.Module:
    """Weights and buffers as fake tensors that say they are on the CPU, so that autocast and kernels are chosen
    as there. Call it within the mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made.setdefault(id(p), nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = made.setdefault(id(b), torch.empty(b.shape, dtype=b.dtype))
    return model


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Activation checkpointing of every block for a while."""
    blocks = blocks_of(model)
    for block in blocks:
        checkpoint_block(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps during `forward`, weights and buffers of `model` aside."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del out
    return total
