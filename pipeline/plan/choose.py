"""The layout that fits and is fastest; or what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from pipeline.config import CalibratorSettings
from pipeline.errors import UsageError
from pipeline.plan.cluster import Cluster
from pipeline.plan.footprint import Images
from pipeline.plan.needs import Needs
from pipeline.plan.predict import Impossible, Layout, Phase, Prediction
from pipeline.plan.step import TeacherSettings

GIB = 2**30


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
    considered = _considered(needs, cluster)
    chosen = min((choice for choice in considered if choice.fits), key=_order, default=None)
    leanest = min(considered, key=lambda choice: choice.peak.total)
    advice = [] if chosen is not None else list(_advice(needs, cluster, leanest))
    return Plan(needs, cluster, chosen, leanest, considered, advice)


def predict(needs: Needs, cluster: Cluster, layout: Layout) -> Choice:
    """Memory and time of one layout."""
    step = Prediction(needs, layout)
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


def _order(choice: Choice) -> tuple[float, int, bool, int]:
    """Faster first; what is simpler among equals."""
    layout = choice.layout
    return sum(choice.step_seconds), layout.shards, layout.checkpointing, layout.micro_batches


def _considered(needs: Needs, cluster: Cluster) -> list[Choice]:
    """For each number of shards, with and without checkpointing: the fewest micro-batches that fit, or the leanest.

    Raises:
        Impossible: the method works in none.
    """
    choices, problem = [], Impossible("no layout was considered")
    for shards, checkpointing in product(_shards(cluster), (False, True)):
        layout = Layout(cluster.accelerators // shards, shards, checkpointing)
        try:
            choices.append(_fewest_parts(needs, cluster, layout))
        except Impossible as error:
            problem = error
    if not choices:
        raise problem
    return choices


def _fewest_parts(needs: Needs, cluster: Cluster, layout: Layout) -> Choice:
    tried = []
    for parts in _divisors(needs.images.share(layout.world).pool):
        tried.append(predict(needs, cluster, replace(layout, micro_batches=parts)))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda choice: choice.peak.total)


def _shards(cluster: Cluster) -> list[int]:
    """Sizes of a group: within a node, then whole nodes."""
    per_node = min(cluster.per_node, cluster.accelerators)
    nodes = cluster.accelerators // per_node
    return sorted({*_divisors(per_node), *(per_node * n for n in _divisors(nodes))})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _fits(needs: Needs, cluster: Cluster) -> bool:
    try:
        return any(choice.fits for choice in _considered(needs, cluster))
    except UsageError:  # the accelerators do not divide a batch, or no layout works
        return False


def _advice(needs: Needs, cluster: Cluster, leanest: Choice) -> Iterator[str]:
    """What would fit instead, each found by planning it."""
    short = leanest.peak.total - cluster.usable
    yield (
        f"the leanest layout ({leanest.layout.name}) is short of {short / GIB:.2f} GiB in the {leanest.peak.name}; "
        f"with accelerators of {leanest.peak.total / GIB / (1 - cluster.headroom):.1f} GiB it would fit"
    )
    for factor in (2, 4, 8, 16, 32, 64):
        larger = replace(cluster, accelerators=cluster.accelerators * factor)
        if _fits(needs, larger):
            yield f"{larger.accelerators:,} accelerators of this kind would do"
            break
    settings, images, least = needs.settings, needs.images, cluster.accelerators
    if settings.method == "mpl-soft" and _fits(replace(needs, settings=replace(settings, method="mpl-hard")), cluster):
        yield "hard feedback (--method mpl-hard) would fit: it keeps no copy of the student's weights"
    if isinstance(settings.teacher, TeacherSettings):
        reduced = replace(settings, method="reduced", teacher=CalibratorSettings())
        if _fits(Needs(reduced, Images(images.pool, images.feedback), needs.steps), cluster):
            yield "Reduced MPL of the same student (--method reduced) would fit: it holds no teacher network"
    if images.pool > least:
        few = replace(
            images, pool=least, feedback=min(images.feedback, least), labelled=least if images.labelled else 0
        )
        if _fits(replace(needs, images=few), cluster):
            yield f"a smaller batch would fit: one pool image on each accelerator ({least:,}) does"
