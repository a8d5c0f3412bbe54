"""`pipeline.plan.choose` and `cluster`: what is chosen fits, and what is advised is true."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.plan.choose import plan, predict
from pipeline.plan.cluster import Cluster, accelerator
from pipeline.plan.needs import Needs
from pipeline.plan.predict import Layout
from pipeline.plan.step import PlannedMethod
from tests.plan.trainings import training

GIB = 2**30


def planned(method: PlannedMethod) -> Needs:
    """4,096 images of each kind, beside which the network weighs little."""
    needs = training(method)
    return replace(needs, images=replace(needs.images, pool=4096, feedback=4096, labelled=4096 * (method != "reduced")))


def cluster(**changes: Any) -> Cluster:
    figures = {"accelerators": 1, "per_node": 8, "memory": 8 * GIB, "flops": 1e12, "efficiency": 0.5,
               "bandwidth": 100e9, "between_nodes": 10e9}  # fmt: skip
    return Cluster(**(figures | changes))


def test_collectives_take_the_slowest_link_of_their_ring() -> None:
    """By hand: an all-reduce in a ring sends 2 (n − 1)/n of the bytes."""
    two_nodes = cluster(accelerators=16)
    assert two_nodes.all_reduce_seconds(1e9, 8) == pytest.approx(2 * 7 / 8 / 100)
    assert two_nodes.all_reduce_seconds(1e9, 16) == pytest.approx(2 * 15 / 16 / 10)
    assert two_nodes.all_reduce_seconds(1e9, 2, stride=8) == pytest.approx(2 * 1 / 2 / 10)
    assert two_nodes.gather_seconds(1e9, 8) == pytest.approx(7 / 8 / 100)


def test_the_chosen_layout_fits_and_the_next_faster_does_not() -> None:
    """As memory shrinks: plain, then checkpointing or micro-batches, then shards, then nothing."""
    ample = plan(planned("mpl-hard"), cluster()).chosen
    assert ample is not None
    assert ample.layout == Layout(1, 1)
    need = ample.peak.total
    tight = cluster(memory=need * 0.8, headroom=0.0)
    chosen = plan(planned("mpl-hard"), tight).chosen
    assert chosen is not None
    assert chosen.peak.total <= tight.usable < need
    assert chosen.layout != ample.layout
    assert chosen.compute >= ample.compute
    assert not predict(planned("mpl-hard"), tight, Layout(1, 1)).fits


def test_where_nothing_fits_the_advice_is_true() -> None:
    """What is said to be missing suffices exactly."""
    small = cluster(memory=3 * 2**20, headroom=0.0)
    found = plan(planned("mpl-soft"), small)
    assert found.chosen is None
    missing = found.leanest.peak.total - small.usable
    assert f"{missing / GIB:.2f} GiB" in found.advice[0]
    assert found.leanest.peak.total == min(choice.peak.total for choice in found.considered)
    assert plan(planned("mpl-soft"), replace(small, memory=found.leanest.peak.total)).chosen is not None
    assert plan(planned("mpl-soft"), replace(small, memory=found.leanest.peak.total - 1)).chosen is None


def test_layouts_that_cannot_work_are_not_considered() -> None:
    """Feedback through divided weights is by finite differences, which bf16 spoils."""
    needs = planned("mpl-soft")
    low = replace(needs, settings=replace(needs.settings, precision=torch.bfloat16))
    assert all(choice.layout.shards == 1 for choice in plan(low, cluster(accelerators=4)).considered)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accelerators": 0}, "at least 1"),
        ({"per_node": 0}, "at least 1"),
        ({"accelerators": 12, "per_node": 8}, "must divide --accelerators"),
        ({"memory": 0}, "--memory must be above 0"),
        ({"flops": -1.0}, "--flops must be above 0"),
        ({"bandwidth": 0.0}, "--bandwidth"),
        ({"headroom": 1.0}, "--headroom"),
        ({"efficiency": 1.5}, "--efficiency"),
    ],
)
def test_impossible_clusters_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cluster(**changes)


def test_batches_that_are_not_divided_are_refused() -> None:
    with pytest.raises(UsageError, match=r"must divide every batch, and 4,096 pool images .* Nearest: 4,095 or 4,100"):
        plan(planned("reduced"), cluster(accelerators=5))


def test_accelerators_by_name() -> None:
    assert accelerator("tpu-v3-core").memory == 16
    with pytest.raises(UsageError, match="did you mean h100-80gb"):
        accelerator("h100-80")
