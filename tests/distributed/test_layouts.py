"""Several gloo processes take the single process's steps: DDP, FSDP2 and hybrid, Reduced and full MPL."""

import functools
from typing import Any

import pytest
import torch

from pipeline.distributed.layouts import Layout
from pipeline.distributed.ranks import ALONE
from tests.distributed.checks import Case, train, train_all
from tests.distributed.worlds import in_ranks, results

pytestmark = pytest.mark.xdist_group("distributed")

SHARDED, HYBRID = Layout("sharded"), Layout("hybrid", shard_size=2)
CASES = {
    "ddp reduced vit": Case(network="vit", rule="adamw"),
    "ddp reduced group norm, weights": Case(rule="rmsprop_tf", weighted=True),
    "ddp soft": Case(method="soft", rule="nesterov"),
    "ddp soft micro-batches": Case(method="soft", micro_batches=2),
    "ddp hard, moving baseline": Case(method="hard", baseline=0.9),
    "ddp micro-batches": Case(micro_batches=2, weighted=True),
    "ddp checkpointed vit": Case(Layout(checkpoint_activations=True), network="vit", rule="rmsprop"),
    "ddp synchronised batch norm": Case(Layout(sync_batch_norm=True), network="batch_norm", clip=False),
    "sharded reduced": Case(SHARDED, engine="central"),
    "sharded reduced one-sided": Case(SHARDED, engine="one_sided", rule="momentum", clip=False),
    "sharded soft vit": Case(SHARDED, "soft", network="vit", rule="adamw", engine="central"),
    "sharded hard vit, micro-batches": Case(SHARDED, "hard", network="vit", micro_batches=2),
    "sharded micro-batches, checkpointed": Case(
        Layout("sharded", checkpoint_activations=True), engine="central", micro_batches=2
    ),
    "sharded by hand": Case(SHARDED, engine="central", foreign=True),
    "hybrid reduced": Case(HYBRID, engine="central"),
    "hybrid soft": Case(HYBRID, "soft", engine="central", rule="rmsprop"),
    "hybrid hard, moving baseline, weights": Case(HYBRID, "hard", rule="adam", baseline=0.9, weighted=True),
}


AMONG_FOUR = [name for name in CASES if name.startswith("hybrid") or name == "sharded soft vit"]
PAIRS = [(name, 2) for name in CASES] + [(name, 4) for name in AMONG_FOUR]
REST = [(name, 4) for name in CASES if name not in AMONG_FOUR]


@functools.cache
def of_ranks(world: int, names: tuple[str, ...]) -> list[dict[str, dict[str, Any]]]:
    return results(in_ranks(world, train_all, {name: CASES[name] for name in names}))


@pytest.mark.parametrize(("name", "world"), PAIRS + [pytest.param(*pair, marks=pytest.mark.long) for pair in REST])
def test_several_processes_take_the_single_ones_steps(name: str, world: int) -> None:
    """Student, teacher and losses after three steps with feedback, float64, the same global batch."""
    expected = train(ALONE, CASES[name].alone)
    together = next(pairs for pairs in (PAIRS, REST) if (name, world) in pairs)
    for found in of_ranks(world, tuple(other for other, ranks in together if ranks == world)):
        assert found[name].keys() == expected.keys()
        worst = max(difference(found[name][key], value) for key, value in expected.items())
        assert worst < (1e-6 if CASES[name].engine != "exact" else 1e-10)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
