"""The layout that fits and is fastest; or what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.errors import UsageError
from pipeline.plan.cluster import Cluster
from pipeline.plan.needs import Needs
from pipeline.plan.step import Layout, Phase, Step

GIB = 2**30


class Impossible(UsageError):
    """A method cannot work here in whatever layout; another one may."""


@dataclass(frozen=True)
class Choice:
    """A layout with its prediction.

    Attributes:
        layout: how the training lies on the cluster.
        phases: of a step, with their memory on one accelerator.
        fits: whether the largest is below what is usable.
        compute, communication: seconds of a step.
        steps: of the training.
    """

    layout: Layout
    phases: list[Phase]
    fits: bool
    compute: float
    communication: float
    steps: int
    flops: float
    exact: bool

    @property
    def peak(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """(with all communication hidden behind calculation, with none hidden)."""
        return max(self.compute, self.communication), self.compute + self.communication


@dataclass(frozen=True)
class Plan:
    """What was found for one method.

    Attributes:
        needs, cluster: what was asked.
        chosen: the fastest layout that fits, or None.
        leanest: the layout that needs least memory.
        considered: the fastest layout of each kind, whether it fits or not.
        advice: where nothing fits: what would.
    """

    needs: Needs
    cluster: Cluster
    chosen: Choice | None
    leanest: Choice
    considered: list[Choice]
    advice: list[str]


def plan(needs: Needs, cluster: Cluster) -> Plan:
    """Choose a layout.

    Raises:
        UsageError: the accelerators do not divide a batch.
        Impossible: the precision rules the method out.
    """
    _require_parts(needs, cluster)
    considered = list(_considered(needs, cluster))
    if not considered:
        raise Impossible(
            "feedback through divided weights is by finite differences, which bf16 spoils: use --precision float32"
        )
    fitting = [choice for choice in considered if choice.fits]
    chosen = min(fitting, key=_order, default=None)
    leanest = min(considered, key=lambda choice: choice.peak.total)
    advice = [] if chosen is not None else list(_advice(needs, cluster, leanest))
    return Plan(needs, cluster, chosen, leanest, considered, advice)


def _order(choice: Choice) -> tuple[float, int, bool, int]:
    """Faster first; what is simpler among equals."""
    layout = choice.layout
    return sum(choice.step_seconds), layout.shards, layout.checkpointing, layout.micro_batches


def _require_parts(needs: Needs, cluster: Cluster) -> None:
    for what, images in needs.batches.items():
        if images % cluster.accelerators:
            near = images // cluster.accelerators * cluster.accelerators
            raise UsageError(
                f"--accelerators (={cluster.accelerators:,}) must divide every batch, and {images:,} {what} "
                f"are not divided. Nearest: {' or '.join(f'{n:,}' for n in (near, near + cluster.accelerators) if n)}"
            )


def _considered(needs: Needs, cluster: Cluster) -> Iterator[Choice]:
    """For each number of shards, with and without checkpointing: the fewest micro-batches that fit, or the leanest."""
    for shards in _shards(cluster):
        if needs.soft and shards > 1 and needs.student.precision is not None:
            continue  # finite differences in bf16 are wrong by 1 to 75%
        for checkpointing in (False, True):
            tried = []
            for parts in _divisors(needs.batch // cluster.accelerators):
                layout = Layout(cluster.accelerators // shards, shards, checkpointing, parts)
                tried.append(predict(needs, cluster, layout))
                if tried[-1].fits:
                    break
            yield tried[-1] if tried[-1].fits else min(tried, key=lambda choice: choice.peak.total)


def predict(needs: Needs, cluster: Cluster, layout: Layout) -> Choice:
    """Memory and time of one layout."""
    step = Step(needs, layout)
    phases = list(step.phases())
    fits = max(phase.total for phase in phases) <= cluster.usable
    return Choice(
        layout,
        phases,
        fits,
        step.compute_seconds(cluster),
        step.communication_seconds(cluster),
        needs.steps,
        step.flops(),
        step.exact,
    )


def _shards(cluster: Cluster) -> list[int]:
    """Sizes of a group: within a node, then whole nodes."""
    per_node = min(cluster.per_node, cluster.accelerators)
    nodes = cluster.accelerators // per_node
    return sorted({*_divisors(per_node), *(per_node * n for n in _divisors(nodes))})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _advice(needs: Needs, cluster: Cluster, leanest: Choice) -> Iterator[str]:
    """What would fit instead, each found by planning it."""
    short = leanest.peak.total - cluster.usable
    yield (
        f"the leanest layout ({leanest.layout.name}) is short of {short / GIB:.2f} GiB in the {leanest.peak.name}; "
        f"with accelerators of {leanest.peak.total / GIB / (1 - cluster.headroom):.1f} GiB it would fit"
    )
    for factor in (2, 4, 8, 16, 32, 64):
        larger = replace(cluster, accelerators=cluster.accelerators * factor)
        if any(images % larger.accelerators for images in needs.batches.values()):
            break
        if any(choice.fits for choice in _considered(needs, larger)):
            yield f"{larger.accelerators:,} accelerators of this kind would do"
            break
    if needs.method == "mpl-soft" and any(
        choice.fits for choice in _considered(replace(needs, method="mpl-hard"), cluster)
    ):
        yield "hard feedback (--method mpl-hard) would fit: it keeps no copy of the student's weights"
    if needs.method != "reduced" and needs.teacher is not None:
        alone = replace(needs, method="reduced", teacher=None)
        if any(choice.fits for choice in _considered(alone, cluster)):
            yield "Reduced MPL of the same student (--method reduced) would fit: it holds no teacher network"
    smaller = cluster.accelerators
    if needs.batch > smaller:
        least = replace(needs, batch=smaller, feedback_batch=min(needs.feedback_batch, smaller))
        if needs.teacher is not None:
            teacher = needs.teacher
            least = replace(
                least,
                teacher=replace(teacher, predicted=smaller if teacher.predicted else 0, learned=2 * smaller),
            )
        if any(choice.fits for choice in _considered(least, cluster)):
            yield f"a smaller batch would fit: one pool image on each accelerator ({smaller:,}) does"
