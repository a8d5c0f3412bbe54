"""Memory and time of a step in one layout: what was measured, divided over the accelerators, and what they send."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pipeline.errors import UsageError
from pipeline.plan.cluster import Cluster
from pipeline.plan.footprint import KINDS, Footprint
from pipeline.plan.measure import footprint
from pipeline.plan.needs import Needs
from pipeline.plan.step import StepSettings, network_sizes

Memory = dict[str, int]  # bytes by kind


@dataclass(frozen=True)
class Layout:
    """How a training lies on a cluster.

    Attributes:
        replicas: groups that hold the networks once each.
        shards: accelerators of a group, over which weights, gradients and optimiser state are divided.
        checkpointing: blocks are calculated again in the backward pass.
        micro_batches: parts of a batch on one accelerator that are calculated one after another.
    """

    replicas: int
    shards: int
    checkpointing: bool = False
    micro_batches: int = 1

    @property
    def world(self) -> int:
        """Accelerators."""
        return self.replicas * self.shards

    @property
    def name(self) -> str:
        """In words."""
        if self.shards == 1:
            kind = "one accelerator" if self.replicas == 1 else f"DDP over {self.replicas:,}"
        else:
            kind = f"FSDP2 over {self.shards:,}"
            if self.replicas > 1:
                kind = f"hybrid {self.replicas:,} × {self.shards:,}"
        words = [kind]
        if self.micro_batches > 1:
            words.append(f"{self.micro_batches} micro-batches")
        if self.checkpointing:
            words.append("activation checkpointing")
        return ", ".join(words)

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """The recipe's section `distributed` that makes this layout."""
        section: dict[str, str | int | bool] = {}
        if self.shards > 1:
            section["layout"] = "hybrid" if self.replicas > 1 else "sharded"
        if self.shards > 1 and self.replicas > 1:
            section["shard_size"] = self.shards
        if self.checkpointing:
            section["checkpoint_activations"] = True
        if self.micro_batches > 1:
            section["micro_batches"] = self.micro_batches
        return section


@dataclass(frozen=True)
class Phase:
    """A part of the step, and what is in memory when it needs most."""

    name: str
    memory: Memory

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


class Impossible(UsageError):
    """A method cannot work here in this layout; another one may."""


class Prediction:
    """One step of a training in a layout, on one accelerator.

    Args:
        needs: the training.
        layout: how it lies on the accelerators.

    Raises:
        UsageError: the accelerators do not divide a batch.
        Impossible: the precision rules the feedback out.

    Attributes:
        exact: whether feedback is by forward mode: not where weights are divided.
    """

    def __init__(self, needs: Needs, layout: Layout) -> None:
        self.needs, self.layout = needs, layout
        self.images = needs.images.share(layout.world)
        self.exact, self.step = _measured(needs.settings, layout)
        self.sizes = network_sizes(needs.settings)

    # --- memory ----------------------------------------------------------------------------------------

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases(), key=lambda phase: phase.total)

    def phases(self) -> Iterator[Phase]:
        """All phases in their order, with everything that is in memory."""
        columns = self.images.columns(self.layout.micro_batches)
        series: dict[str, np.ndarray] = {}
        for (kind, divided), forms in self.step.moments.items():
            if kind == "gradients" and self._buckets:
                forms = forms.max(axis=0, keepdims=True)
            series[kind] = series.get(kind, np.zeros(1)) + forms @ columns / (self.layout.shards if divided else 1)
        whole = sum(series.values(), np.zeros(1))
        for name, first, last in self.step.phases:
            at = first + int(whole[first:last].argmax())
            memory = {kind: int(values[min(at, len(values) - 1)]) for kind, values in series.items()}
            for kind, size in self._unmeasured(name).items():
                memory[kind] = memory.get(kind, 0) + size
            yield Phase(name, {kind: memory[kind] for kind in KINDS if memory.get(kind)})

    def _unmeasured(self, phase: str) -> Memory:
        """What one accelerator and two micro-batches do not show."""
        shards, student = self.layout.shards, self.sizes["student"]
        more = dict.fromkeys(KINDS, 0)
        if self.needs.settings.soft:  # each micro-batch keeps the running statistics from before it
            more["replay"] = max(0, self.layout.micro_batches - 2) * student.buffers
        if shards > 1:
            if phase == "feedback":  # divided weights are put back from a copy after each finite difference
                more["replay"] += student.weights // shards
            # whole blocks: one in use, one on its way, and the gradient of one
            more["gathered blocks"] = 3 * max(size.largest_block for size in self.sizes.values())
        return more

    @property
    def _buckets(self) -> bool:
        """Whether DDP holds the gradients in buckets of its own, all the time."""
        return self.layout.shards == 1 and self.layout.replicas > 1

    # --- time -------------------------------------------------------------------------------------------

    def flops(self) -> float:
        """Floating-point operations of one accelerator, averaged over the steps with feedback and without."""
        share = 1 / self.needs.settings.every
        return float((share * self.step.flops + (1 - share) * self.step.flops_without) @ self.images.columns())

    def compute_seconds(self, cluster: Cluster) -> float:
        """At the cluster's rate."""
        return self.flops() / (cluster.flops * cluster.efficiency)

    def communication_seconds(self, cluster: Cluster) -> float:
        """Gradients (and divided weights) on their way, as if nothing were calculated meanwhile."""
        settings, parts = self.needs.settings, self.layout.micro_batches
        share, weights = 1 / settings.every, self.sizes["student"].weights
        total = self._pass_seconds(cluster, weights)
        if settings.soft:  # ∇R, and one forward pass along v or two beside θ
            forwards = 2 if not self.exact and settings.engine != "one_sided" else 1
            total += share * (self._pass_seconds(cluster, weights) + forwards * self._gather_seconds(cluster, weights))
        else:  # R before and after
            total += 2 * share * self._gather_seconds(cluster, weights)
        if "teacher" in self.sizes:  # predictions for the weak view, and with micro-batches each forward pass twice
            weights = self.sizes["teacher"].weights
            forwards = ("pool_weak" in settings.views) + (parts > 1)
            total += self._pass_seconds(cluster, weights) + forwards * self._gather_seconds(cluster, weights)
        return total

    def _pass_seconds(self, cluster: Cluster, size: int) -> float:
        """A forward and a backward pass over each micro-batch, and the gradients' average over the ranks."""
        layout = self.layout
        total = 3 * self._gather_seconds(cluster, size)  # weights twice, and gradients scattered
        if layout.replicas > 1:
            total += cluster.all_reduce_seconds(size / layout.shards, layout.replicas, stride=layout.shards)
        return total

    def _gather_seconds(self, cluster: Cluster, size: int) -> float:
        """Weights that are gathered once for each micro-batch."""
        shards = self.layout.shards
        return self.layout.micro_batches * cluster.gather_seconds(size, shards) if shards > 1 else 0.0


def _measured(settings: StepSettings, layout: Layout) -> tuple[bool, Footprint]:
    """(whether feedback is exact, what a step needs on one accelerator)."""
    run = partial(footprint, checkpointing=layout.checkpointing, halves=layout.micro_batches > 1)
    exact = settings.soft and settings.engine == "exact" and layout.shards == 1
    step = run(settings) if exact or not settings.soft else None
    if step is not None:
        return exact, step
    if settings.engine == "exact":  # divided weights, or a network with an operation that has no forward mode
        settings = replace(settings, engine="central")
    if settings.precision is not None or (step := run(settings)) is None:
        raise Impossible(
            "feedback through divided weights is by finite differences, which bf16 spoils: use --precision float32"
        )
    return False, step
