"""Each way to get the gradients of several processes wrong must be noticed by the comparison with one process."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pipeline import teacher_network
from pipeline.distributed import sharded
from pipeline.distributed.layouts import Layout
from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.distributed.sharded import reshard
from pipeline.distributed.sync_batch_norm import SumOverRanks
from pipeline.gradient import derivative, labelled_loss, replay, update_rules
from pipeline.gradient.labelled_loss import LabelledLoss
from pipeline.student import Feedback, Student, StudentStep
from pipeline.teacher_network import TeacherNetwork
from tests.distributed.checks import Case, train
from tests.distributed.test_layouts import difference
from tests.distributed.worlds import in_ranks, results

pytestmark = pytest.mark.xdist_group("distributed")

Patch = pytest.MonkeyPatch
COPIES = Case(clip=True)
SHARDS = Case(Layout("sharded"), engine="central", foreign=True)
SOFT, HARD = Case(method="soft"), Case(method="hard", baseline=0.9)
STATISTICS = Case(Layout(sync_batch_norm=True), network="batch_norm", clip=False)


def nothing(patch: Patch) -> None:
    pass


def divided_by_the_local_batch(patch: Patch) -> None:
    original = StudentStep.feedback

    def feedback(self, *arguments, **options):
        gradient, labelled_loss = original(self, *arguments, **options)
        return Feedback(gradient * self.student.ranks.world, labelled_loss)

    patch.setattr(StudentStep, "feedback", feedback)


def own_gradient_of_the_labelled_loss(patch: Patch) -> None:
    alone(patch, LabelledLoss, "gradient")


def own_labelled_losses(patch: Patch) -> None:
    alone(patch, LabelledLoss, "value")


def own_loss(patch: Patch) -> None:
    alone(patch, Student, "_agreed")


def norm_of_the_own_shard(patch: Patch) -> None:
    patch.setattr(sharded, "norm_over_shards", lambda module, tensors: torch.nn.utils.get_total_norm(list(tensors)))


def clipping_term_of_the_own_shard(patch: Patch) -> None:
    patch.setattr(update_rules, "sum_over_shards", lambda module, value: value)


def step_of_the_own_shard(patch: Patch) -> None:
    patch.setattr(derivative, "norm_over_shards", lambda module, tensors: torch.nn.utils.get_total_norm(list(tensors)))


def what_was_gathered_is_kept(patch: Patch) -> None:
    """No reshard() between the passes of a finite difference."""

    def only_once(module: torch.nn.Module) -> None:
        if torch.is_grad_enabled():
            reshard(module)

    patch.setattr(replay, "reshard", only_once)
    patch.setattr(labelled_loss, "reshard", only_once)


def own_tangents_of_statistics(patch: Patch) -> None:
    patch.setattr(SumOverRanks, "jvp", staticmethod(lambda ctx, tangent: tangent.clone()))


def own_gradients_of_statistics(patch: Patch) -> None:
    patch.setattr(SumOverRanks, "backward", staticmethod(lambda ctx, gradient: gradient.clone()))


def feedback_not_times_the_ranks(patch: Patch) -> None:
    original = teacher_network.fed_back
    patch.setattr(teacher_network, "fed_back", lambda *a: original(*a) / a[-1].world)


def feedback_scale_of_the_own_rows(patch: Patch) -> None:
    original = teacher_network.feedback_scale
    patch.setattr(teacher_network, "feedback_scale", lambda step, options, batch: original(step, options, batch // 2))


def every_rank_samples_as_the_first(patch: Patch) -> None:
    original = TeacherNetwork._sample

    def run(self, q, step):
        ranks, self.ranks = self.ranks, Ranks(0, self.ranks.world)
        try:
            return original(self, q, step)
        finally:
            self.ranks = ranks

    patch.setattr(TeacherNetwork, "_sample", run)


def alone(patch: Patch, owner: type, method: str) -> None:
    """The method runs as if there were one rank."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def run(self, *arguments):
        lonely = copy.copy(self)
        object.__setattr__(lonely, "ranks", ALONE)
        return original(lonely, *arguments)

    patch.setattr(owner, method, run)


MISTAKES: dict[str, tuple[Callable[[Patch], None], Case]] = {
    "none, copies": (nothing, COPIES),
    "none, shards": (nothing, SHARDS),
    "none, statistics": (nothing, STATISTICS),
    "none, soft": (nothing, SOFT),
    "none, hard": (nothing, HARD),
    "feedback_not_times_the_ranks": (feedback_not_times_the_ranks, SOFT),
    "feedback_scale_of_the_own_rows": (feedback_scale_of_the_own_rows, HARD),
    "every_rank_samples_as_the_first": (every_rank_samples_as_the_first, HARD),
    "own_tangents_of_statistics": (own_tangents_of_statistics, STATISTICS),
    "own_gradients_of_statistics": (own_gradients_of_statistics, STATISTICS),
    **{
        mistake.__name__: (mistake, case)
        for case, mistakes in (
            (
                COPIES,
                [divided_by_the_local_batch, own_gradient_of_the_labelled_loss, own_labelled_losses, own_loss],
            ),
            (
                SHARDS,
                [
                    norm_of_the_own_shard,
                    clipping_term_of_the_own_shard,
                    step_of_the_own_shard,
                    what_was_gathered_is_kept,
                ],
            ),
        )
        for mistake in mistakes
    },
}


def make_all(ranks: Ranks) -> dict[str, dict[str, torch.Tensor] | str]:
    found: dict[str, dict[str, torch.Tensor] | str] = {}
    for name, (mistake, case) in MISTAKES.items():
        with Patch.context() as patch:
            mistake(patch)
            try:
                found[name] = train(ranks, case)
            except RuntimeError as error:
                found[name] = str(error)
    return found


@functools.cache
def of_two() -> dict[str, dict[str, torch.Tensor] | str]:
    return results(in_ranks(2, make_all))[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_noticed(name: str) -> None:
    case = MISTAKES[name][1]
    expected, found = train(ALONE, replace(case.alone)), of_two()[name]
    worst = 1.0 if isinstance(found, str) else max(difference(found[key], expected[key]) for key in expected)
    assert (worst < 1e-6) == name.startswith("none"), (worst, found if isinstance(found, str) else "")
