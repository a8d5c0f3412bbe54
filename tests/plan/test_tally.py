"""`pipeline.plan.tally`: memory and operations as torch has them, and answers where there is no data."""

from itertools import accumulate

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.plan.tally import Tally, trace


def test_depthwise_convolutions_are_counted_with_their_groups() -> None:
    """By hand: 2 · pixels · channels · kernel, forward and in each of two gradients."""
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    with Tally() as tally:
        layer(x).sum().backward()
    assert sum(flops * times for flops, times in tally.flops.items()) == 3 * (2 * 2 * 25 * 8 * 9)


def test_the_peak_is_what_the_allocator_gives_out() -> None:
    """Oracle: torch's profiler of memory."""
    x, layers = torch.randn(64, 100), nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 10))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile, Tally() as tally:
        layers(x).square().mean().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    living = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert tally.peak == pytest.approx(max(living), rel=0.01)
    assert tally.peak > 2 * 64 * 300 * 4


def test_memory_lives_from_its_allocation_to_its_end() -> None:
    """By hand: 4 bytes a number; a view, and a change in place, are no memory of their own."""
    old = torch.zeros(1000)
    with Tally() as tally:
        a = torch.zeros(10)
        b = a.view(2, 5).add_(1).t()
        c = a + 1
        del a, b
        d = torch.cat([c, c])
        old.add_(1).view(10, 100)
        tally.label("kept", [d], divided=True)
    assert [piece.size for piece in tally.pieces] == [40, 40, 80]
    assert trace(tally.pieces, [40, 40, 80], 3).tolist() == [40, 80, 120]
    assert tally.peak == 120
    assert [piece.kind for piece in tally.pieces] == [None, None, ("kept", True)]


def test_what_is_asked_of_values_is_answered_as_in_an_ordinary_step() -> None:
    with FakeTensorMode(), Tally():
        loss = torch.randn(5).square().mean()
        assert float(loss.detach()) == 1.0
        assert torch.isfinite(loss)
        assert loss != 0
        assert not 1 / (loss + 1e-6) >= 1  # a gradient is clipped
        assert float((loss - loss).abs().max()) == 0.0  # a replay differs by nothing
        assert int(torch.tensor([3]).sum()) == 1
        rows = torch.zeros(6, 2)[torch.ones(6, dtype=torch.bool)]
    assert rows.shape == (6, 2)
