"""`pipeline.plan.measure`: what one run without data says of other numbers of images is what real tensors take."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import RecipeError
from pipeline.gradient.repeatable import CHECKS
from pipeline.plan.predict import Layout, Prediction
from pipeline.plan.step import PlannedMethod, network_sizes
from tests.plan.trainings import real_peak, real_step, training

PLAIN, CHECKPOINTING = Layout(1, 1), Layout(1, 1, checkpointing=True)


@pytest.mark.parametrize(
    ("method", "network", "teaching", "layout"),
    [
        ("reduced", "wrn_10_1", "", PLAIN),
        ("reduced", "wrn_10_1", "", Layout(1, 1, micro_batches=4)),
        ("reduced", "test_efficientnet", "", CHECKPOINTING),
        ("mpl-soft", "wrn_10_1", "uda", Layout(1, 1, micro_batches=2)),
        ("mpl-soft", "three_blocks", "pseudo_labels", PLAIN),
        ("mpl-soft", "three_blocks", "mixup", Layout(1, 1, checkpointing=True, micro_batches=3)),
        ("mpl-hard", "three_blocks", "supervised", CHECKPOINTING),
        ("mpl-hard", "test_vit", "uda", PLAIN),
    ],
)
def test_memory_is_that_of_a_real_step(method: PlannedMethod, network: str, teaching: str, layout: Layout) -> None:
    """Oracle: bytes of the tensors that live during a step on real images, in other numbers than were measured."""
    needs = training(method, network, teaching or "uda")
    assert Prediction(needs, layout).peak.total == pytest.approx(real_peak(needs, layout), rel=0.01)


@pytest.mark.parametrize("rule", ["rmsprop_tf", "adamw"])
def test_optimisers_are_those_of_a_real_step(rule: str) -> None:
    """Memory in all, and the state by itself."""
    needs = training("reduced", rule=rule)
    peak = Prediction(needs, PLAIN).peak
    assert peak.total == pytest.approx(real_peak(needs, PLAIN), rel=0.01)
    step, take = real_step(needs)
    take()
    state = [t for state in step.student.optimizer.state.values() for t in state.values()]
    assert peak.memory["optimiser"] == pytest.approx(
        sum(torch.as_tensor(t).nbytes for t in state), rel=0.02
    )  # but for its counters
    model = step.student.module
    assert peak.memory["parameters"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def test_mixed_precision_and_finite_differences_too() -> None:
    low = training("reduced", precision=torch.bfloat16)
    assert Prediction(low, PLAIN).peak.total == pytest.approx(real_peak(low, PLAIN), rel=0.01)
    central = training("reduced", engine="central")
    found = Prediction(central, PLAIN)
    assert not found.exact
    assert found.peak.total == pytest.approx(real_peak(central, PLAIN), rel=0.01)


@pytest.mark.parametrize("method", ["reduced", "mpl-soft", "mpl-hard"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_operations_are_those_of_torch(method: PlannedMethod, micro_batches: int) -> None:
    """Oracle: torch's own counter on a real step; with feedback at every fourth step, three without."""
    layout = Layout(1, 1, micro_batches=micro_batches)
    needs = training(method)
    _, take = real_step(needs, layout)
    for _ in range(CHECKS):  # the first steps try the network out
        take(feedback=True)
    counts = []
    for feedback in (True, False):
        with FlopCounterMode(display=False) as counter:
            take(feedback=feedback)
        counts.append(counter.get_total_flops())
    assert Prediction(needs, layout).flops() == pytest.approx(counts[0], rel=1e-3)  # torch does not count addmm_
    if micro_batches == 1:
        rarely = replace(needs, settings=replace(needs.settings, every=4))
        assert Prediction(rarely, layout).flops() == pytest.approx(counts[0] / 4 + 3 * counts[1] / 4, rel=1e-3)


def test_the_largest_block_is_gathered_whole() -> None:
    """By hand: the last of three blocks of WRN-10-1, 32 to 64 channels, with its 1×1 shortcut and two norms."""
    block = 4 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64 + 2 * 32 + 2 * 64)
    assert network_sizes(training("reduced", "wrn_10_1").settings)["student"].largest_block == block


def test_unknown_networks_are_named() -> None:
    needs = training("reduced")
    model = needs.settings.student.model_copy(update={"name": "resnet81"})
    with pytest.raises(RecipeError, match="did you mean"):
        Prediction(replace(needs, settings=replace(needs.settings, student=model)), PLAIN)
