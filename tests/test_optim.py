"""Schedules, optimisers and the moving average against hand calculations."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipeline.config import OptimizerSettings, ScheduleSettings
from pipeline.optim import average_with_warmup, build_optimizer, learning_rate


def test_cosine_with_warmup() -> None:
    settings = ScheduleSettings(kind="cosine", warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(settings, 1.0, step, 14) for step in range(14)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(settings, 1.0, 14, 14) == pytest.approx(0.1)


def test_exponential_in_stairs() -> None:
    settings = ScheduleSettings(kind="exponential", decay_rate=0.5, decay_every=3)
    assert [learning_rate(settings, 8.0, step, 9) for step in range(9)] == [8, 8, 8, 4, 4, 4, 2, 2, 2]


def test_average_decay_is_the_smaller_of_d_and_1_plus_t_over_10_plus_t() -> None:
    """The batch statistics too; the counter is copied."""
    model = nn.BatchNorm1d(1)
    average = AveragedModel(model, multi_avg_fn=average_with_warmup(0.5), use_buffers=True)
    expected = None
    for t in range(12):
        with torch.no_grad():
            model.weight.fill_(float(t))
            model.running_mean.fill_(-float(t))  # type: ignore[union-attr,operator]
            model.num_batches_tracked.fill_(t)  # type: ignore[union-attr,operator]
        average.update_parameters(model)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = float(t) if expected is None else decay * expected + (1 - decay) * t
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
        assert average.module.running_mean.item() == pytest.approx(-expected, rel=1e-5)
        assert int(average.module.num_batches_tracked) == t


def test_rmsprop_tf_is_tensorflows_rule() -> None:
    """ε inside the root, average from one, the learning rate inside the momentum."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    holder = nn.ParameterList([p])
    settings = OptimizerSettings(rule="rmsprop_tf", lr=0.1, momentum=0.9, alpha=0.9, eps=1e-3)
    optimizer = build_optimizer(holder, settings)
    theta, square, moved = (
        p.detach().clone(),
        torch.ones(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    for step in range(3):
        g = torch.tensor([0.3, -0.7], dtype=torch.float64) * (step + 1)
        p.grad = g.clone()
        optimizer.step()
        square = 0.9 * square + 0.1 * g**2
        moved = 0.9 * moved + 0.1 * g / (square + 1e-3).sqrt()
        theta = theta - moved
        torch.testing.assert_close(p.detach(), theta, rtol=1e-12, atol=0)


def test_weight_decay_spares_norms_and_biases_unless_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for decay_norm, expected in ((False, {0.1: 1, 0.0: 3}), (True, {0.1: 4})):
        optimizer = build_optimizer(model, OptimizerSettings(weight_decay=0.1, decay_norm=decay_norm))
        assert {g["weight_decay"]: len(g["params"]) for g in optimizer.param_groups} == expected


@pytest.mark.parametrize(
    ("rule", "kind"), [("sgd", "SGD"), ("nesterov", "SGD"), ("rmsprop", "RMSprop"), ("adamw", "AdamW")]
)
def test_rules_by_name(rule: str, kind: str) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerSettings(rule=rule))
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0].get("nesterov", False) == (rule == "nesterov")
