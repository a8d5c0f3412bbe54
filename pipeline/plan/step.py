"""One training step on one accelerator: what is in memory in each of its phases, and how long it takes.

The phases are those of `pipeline.training.train_step`, in their order; `docs/plan.md` lists them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from pipeline.errors import UsageError
from pipeline.plan.cluster import Cluster
from pipeline.plan.live import Pass
from pipeline.plan.needs import Needs
from pipeline.plan.network import Costs

FLOAT = 4  # bytes
Memory = dict[str, int]  # bytes by kind
KINDS = (
    "parameters", "gradients", "optimiser", "EMA", "replay", "activations", "calibrator", "batch", "gathered blocks"
)  # fmt: skip


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
    def name(self) -> str:
        """In words."""
        if self.shards == 1:
            kind = "one accelerator" if self.replicas == 1 else f"DDP over {self.replicas:,}"
        else:
            kind = f"FSDP2 over {self.shards:,}"
            if self.replicas > 1:
                kind = f"hybrid {self.replicas:,} × {self.shards:,}"
        parts = [kind]
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches")
        if self.checkpointing:
            parts.append("activation checkpointing")
        return ", ".join(parts)

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """The recipe's section `distributed` that makes this layout."""
        found: dict[str, str | int | bool] = {}
        if self.shards > 1:
            found["layout"] = "hybrid" if self.replicas > 1 else "sharded"
        if self.shards > 1 and self.replicas > 1:
            found["shard_size"] = self.shards
        if self.checkpointing:
            found["checkpoint_activations"] = True
        if self.micro_batches > 1:
            found["micro_batches"] = self.micro_batches
        return found


@dataclass(frozen=True)
class Phase:
    """A part of the step, and what is in memory when it needs most."""

    name: str
    memory: Memory

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


class Step:
    """One step of a training in a layout.

    Args:
        needs: the training.
        layout: how it lies on the accelerators.

    Raises:
        UsageError: the accelerators do not divide a batch.
    """

    def __init__(self, needs: Needs, layout: Layout) -> None:
        self.needs, self.layout = needs, layout
        self.world = layout.replicas * layout.shards
        self.images = self._share(needs.batch, "pool images")
        self.micro = ceil(self.images / layout.micro_batches)
        self.labelled = self._share(needs.feedback_batch, "labelled images of a feedback")
        self.micro_labelled = ceil(self.labelled / layout.micro_batches)
        teacher = needs.teacher
        self.learned = 0 if teacher is None else self._share(teacher.learned, "images that the teacher learns from")
        self.micro_learned = ceil(self.learned / layout.micro_batches)
        self.predicted = 0 if teacher is None else self._share(teacher.predicted, "images of the weak view")
        self.micro_predicted = ceil(self.predicted / layout.micro_batches)

    def _share(self, images: int, what: str) -> int:
        if images % self.world:
            raise UsageError(f"{self.world:,} accelerators do not divide {images:,} {what}")
        return images // self.world

    # --- memory ----------------------------------------------------------------------------------------

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases(), key=lambda phase: phase.total)

    def phases(self) -> Iterator[Phase]:
        """All phases in their order, with everything that is in memory."""
        needs, layout = self.needs, self.layout
        student, s = needs.student, layout.shards
        own = self._part(student.parameter_bytes)  # one copy of the student's weights, or gradients
        training = student.checkpointed if layout.checkpointing else student.training
        held, theirs = 0, 0
        if needs.teacher is not None:
            teacher = needs.teacher.costs
            theirs = self._part(teacher.parameter_bytes)
            learning = teacher.checkpointed if layout.checkpointing else teacher.training
            old = {"gradients": own + theirs}
            if self.predicted:
                yield self._phase("teacher's prediction", old, activations=teacher.forward.peak(self.micro_predicted))
            if layout.micro_batches == 1:
                activations, held = learning.forward.activations(self.learned), learning.held(self.learned)
            else:  # without a gradient: each part is calculated again in the teacher's turn
                activations = teacher.forward.peak(self.micro_learned)
            yield self._phase("teacher's forward", old, activations=activations)
        waiting = {"gradients": theirs, "activations": held}
        if not needs.soft:
            probe = student.forward.peak(self.micro_labelled)
            yield self._phase("labelled loss", waiting, gradients=own, activations=probe)

        replay = {"replay": own + layout.micro_batches * student.buffer_bytes} if needs.soft else {}
        before = _sum(waiting, replay)
        forward = training.forward.activations(self.micro)
        yield self._phase("student's forward", before, gradients=own, activations=forward)
        activations, gradients = training.backward.moment(self.micro, s)
        if self.images > self.micro or self._buckets:  # gradients stand already
            activations, gradients = training.backward.activations(self.micro), own
        yield self._phase("student's backward", before, activations=activations, gradients=gradients)
        if needs.soft:
            replay["replay"] += self._part(student.derivative_bytes(needs.optimizer))  # D
        after = _sum(waiting, replay, {"gradients": own})
        yield self._phase("student's update", after, activations=self._update_bytes(own))
        if needs.soft:
            labelled = (student.labelled_checkpointed if layout.checkpointing else student.labelled).forward
            activations, gradients = labelled.moment(self.micro_labelled, s)
            parts = ceil(self.labelled / max(1, self.micro_labelled))
            summed = min(2, parts - 1) * own  # the sum so far, and the last part's
            yield self._phase(
                "labelled gradient", after, activations=activations, gradients=gradients + summed,
                replay=student.buffer_bytes,
            )  # fmt: skip
            clipping = 2 * own if needs.optimizer.clip_norm is not None else 0
            yield self._phase(
                "feedback", after, activations=self._feedback_bytes(own),
                replay=own + clipping + student.buffer_bytes,  # v
            )  # fmt: skip
        if needs.teacher is not None:
            activations, gradients = learning.backward.moment(self.learned, s)
            if layout.micro_batches > 1:
                activations, gradients = _larger(learning, self.micro_learned) + teacher.buffer_bytes, theirs
            elif self._buckets:
                activations, gradients = learning.backward.activations(self.learned), theirs
            rest = _sum(replay, {"gradients": own})
            yield self._phase("teacher's backward", rest, activations=activations, gradients=gradients)
            rest["gradients"] += theirs
            yield self._phase("teacher's update", rest, activations=self._update_bytes(theirs))

    def _feedback_bytes(self, own: int) -> int:
        """Activations of the pass along v, for one micro-batch."""
        student = self.needs.student
        if self.exact and student.forward_mode is not None:
            return student.forward_mode.peak(self.micro)
        moved = (
            own if self.layout.shards == 1 else 2 * own
        )  # weights moved along v; divided ones are put back from a copy
        return student.forward.peak(self.micro) + moved

    @property
    def _buckets(self) -> bool:
        """Whether DDP holds the gradients in buckets of its own, all the time."""
        return self.layout.shards == 1 and self.layout.replicas > 1

    @property
    def exact(self) -> bool:
        """Whether feedback is by forward mode: not where weights are divided."""
        wanted = self.needs.soft and self.needs.engine == "exact" and self.layout.shards == 1
        return wanted and self.needs.student.forward_mode is not None

    def _phase(self, name: str, *parts: Memory, **more: int) -> Phase:
        return Phase(name, {kind: size for kind, size in _sum(self._standing(), *parts, more).items() if size})

    def _standing(self) -> Memory:
        """What is in memory all the time."""
        needs = self.needs
        student = needs.student
        image = 3 * student.image_size**2 * FLOAT
        found = dict.fromkeys(KINDS, 0)
        found["parameters"] = self._part(student.parameter_bytes) + student.buffer_bytes
        found["optimiser"] = self._part(student.optimizer_bytes(needs.optimizer))
        found["EMA"] = found["parameters"]
        found["calibrator"] = 4 * needs.calibrator * FLOAT  # weights, gradients, two averages of Adam
        found["batch"] = (self.images + self.labelled) * image
        found["gathered blocks"] = self._gathered(student)
        if needs.teacher is not None:
            teacher = needs.teacher.costs
            found["parameters"] += self._part(teacher.parameter_bytes) + teacher.buffer_bytes
            found["optimiser"] += self._part(teacher.optimizer_bytes(needs.teacher.optimizer))
            found["batch"] += (self.predicted + 2 * self.learned) * image  # joined by a copy
            found["gathered blocks"] = max(found["gathered blocks"], self._gathered(teacher))
        return found

    def _part(self, size: int) -> int:
        """An accelerator's part of what is divided over the shards."""
        return ceil(size / self.layout.shards)

    def _gathered(self, costs: Costs) -> int:
        """Whole blocks: one in use, one on its way, and the gradient of one."""
        return 3 * costs.largest_block_bytes if self.layout.shards > 1 else 0

    def _update_bytes(self, size: int) -> int:
        """What the optimiser needs for itself while it works: torch's fused loops make one copy."""
        return 0 if self.needs.optimizer.rule == "rmsprop_tf" else size

    # --- time -------------------------------------------------------------------------------------------

    def flops(self) -> float:
        """Floating-point operations of one accelerator, averaged over the steps with feedback and without."""
        needs, layout = self.needs, self.layout
        student = needs.student
        training = student.checkpointed if layout.checkpointing else student.training
        total = training.flops(self.images)
        if needs.soft:
            labelled = student.labelled_checkpointed if layout.checkpointing else student.labelled
            total += (labelled.flops(self.labelled) + self._feedback_flops()) / needs.every
        else:
            total += 2 * student.forward.flops(self.labelled) / needs.every
        if needs.teacher is not None:
            teacher = needs.teacher.costs
            learning = teacher.checkpointed if layout.checkpointing else teacher.training
            total += teacher.forward.flops(self.predicted) + learning.flops(self.learned)
            if layout.micro_batches > 1:
                total += teacher.forward.flops(self.learned)
        return total

    def _feedback_flops(self) -> float:
        student = self.needs.student
        if self.exact and student.forward_mode is not None:
            return student.forward_mode.flops(self.images)
        return self._differences * student.forward.flops(self.images)

    @property
    def _differences(self) -> int:
        return 1 if self.needs.engine == "one_sided" else 2

    def compute_seconds(self, cluster: Cluster) -> float:
        """At the cluster's rate."""
        return self.flops() / (cluster.flops * cluster.efficiency)

    def communication_seconds(self, cluster: Cluster) -> float:
        """Gradients (and divided weights) on their way, as if nothing were calculated meanwhile."""
        needs, parts = self.needs, self.layout.micro_batches
        share = 1 / needs.every
        student = needs.student.parameter_bytes
        total = self._pass_seconds(cluster, student, parts)
        if needs.soft:
            total += share * self._pass_seconds(cluster, student, parts)  # ∇R
            total += share * self._gather_seconds(cluster, student) * parts * (1 if self.exact else self._differences)
        else:
            total += 2 * share * self._gather_seconds(cluster, student) * parts
        if needs.teacher is not None:
            teacher = needs.teacher.costs.parameter_bytes
            total += self._pass_seconds(cluster, teacher, parts)
            total += self._gather_seconds(cluster, teacher) * parts * (bool(self.predicted) + (parts > 1))
        return total

    def _pass_seconds(self, cluster: Cluster, size: int, parts: int) -> float:
        """A forward and a backward pass over each micro-batch, and the gradients' average over the ranks."""
        layout = self.layout
        found = 3 * parts * self._gather_seconds(cluster, size)  # weights twice, and gradients scattered
        if layout.replicas > 1:
            found += cluster.all_reduce_seconds(size / layout.shards, layout.replicas, stride=layout.shards)
        return found

    def _gather_seconds(self, cluster: Cluster, size: int) -> float:
        return cluster.gather_seconds(size, self.layout.shards) if self.layout.shards > 1 else 0.0


def _larger(learning: Pass, images: int) -> int:
    """Largest activations of a pass whose gradients stand already."""
    return max(learning.forward.activations(images), learning.backward.activations(images))


def _sum(*parts: Memory) -> Memory:
    found: Memory = {}
    for part in parts:
        for kind, size in part.items():
            found[kind] = found.get(kind, 0) + size
    return found
