"""Each way to get the meta-gradient wrong that was met in practice must be noticed.

A mutant puts one mistake in; `broken` says what it broke, or None. Without a mutant it must say None, and
with each of them something else: so these are tests of the tests as well.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.optim import RMSpropTF
from torch import nn

from pipeline import student
from pipeline.errors import FeedbackError
from pipeline.gradient import derivative, labelled_loss, replay, update_rules
from pipeline.gradient.replay import Replay
from pipeline.gradient.update_rules import Update
from pipeline.student import Student, StudentStep
from tests.problems import Problem, make_problem, relative_error

Patch = pytest.MonkeyPatch
BN = nn.modules.batchnorm._BatchNorm


def the_problem() -> Problem:
    return make_problem("efficientnet", "rmsprop_tf", clip=True, dropout=True, drop_path=True)


def broken(problem: Problem) -> str | None:
    """What is wrong with the gradient or left behind by it."""
    exact = problem.oracle()
    try:
        step = problem.learn()
    except FeedbackError as error:
        return f"guard: {error}"
    model = problem.student.model
    before = {name: b.clone() for name, b in model.named_buffers()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    try:
        found = step.target_gradient(problem.labelled, problem.labels)
    except FeedbackError as error:
        return f"guard: {error}"
    if any(not torch.equal(b, before[name]) for name, b in model.named_buffers()):
        return "running statistics moved"
    if any(p.grad is not None and not torch.equal(p.grad, grads[name]) for name, p in model.named_parameters()):
        return ".grad was disturbed"
    if modes != [m.training for m in model.modules()]:
        return "training modes were left changed"
    if not torch.equal(random, torch.get_rng_state()):
        return "the random state moved"
    error = relative_error(found, exact)
    return None if error < 1e-8 else f"gradient off by {error:.1e}"


def test_nothing_is_broken_without_a_mistake() -> None:
    assert broken(the_problem()) is None


def other_masks(patch: Patch) -> None:
    patch.setattr(replay, "replayed_random_numbers", lambda rng, device: nullcontext())


def without_guard(patch: Patch) -> None:
    patch.setattr(derivative, "check_replay", lambda *_: None)


def other_masks_unguarded(patch: Patch) -> None:
    @contextmanager
    def reseeded(rng, device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            yield

    without_guard(patch)
    patch.setattr(replay, "replayed_random_numbers", reseeded)


def changed_record(patch: Patch, change: Callable[[Replay], Replay]) -> None:
    original = replay.record
    patch.setattr(student, "record", lambda *a: change(original(*a)))


def batch_norm_in_eval_mode(patch: Patch) -> None:
    without_guard(patch)
    changed_record(
        patch,
        lambda r: replace(r, modes={n: r.modes[n] and not isinstance(m, BN) for n, m in r.module.named_modules()}),
    )


def replay_at_the_new_weights(patch: Patch) -> None:
    without_guard(patch)
    changed_record(patch, lambda r: replace(r, parameters={n: p.detach() for n, p in r.module.named_parameters()}))


def labelled_gradient_at_the_old_weights(patch: Patch) -> None:
    kept: list[Replay] = []
    original = labelled_loss.labelled_loss_gradient

    def keep(r: Replay) -> Replay:
        kept.append(r)
        return r

    def at_old(module, *args):
        now = {n: p.detach().clone() for n, p in module.named_parameters()}
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(kept[-1].parameters[n])
        result = original(module, *args)
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(now[n])
        return result

    changed_record(patch, keep)
    patch.setattr(labelled_loss, "labelled_loss_gradient", at_old)


def sgd_derivative_on_rmsprop(patch: Patch) -> None:
    patch.setitem(update_rules.DERIVATIVES, RMSpropTF, lambda group, state, g: -group["lr"])


def denominator_taken_as_constant(patch: Patch) -> None:
    def constant(group, state, g):
        square = group["alpha"] * state["square_avg"] + (1 - group["alpha"]) * g**2
        return -group["lr"] / (square + group["eps"]).sqrt()

    patch.setitem(update_rules.DERIVATIVES, RMSpropTF, constant)


def last_layer_only(patch: Patch) -> None:
    original = Update.pull_back
    patch.setattr(
        Update,
        "pull_back",
        lambda self, g: {n: v for n, v in original(self, g).items() if "classifier" in n},
    )


def clipping_term_ignored(patch: Patch) -> None:
    patch.setattr(Update, "pull_back", lambda self, g: {n: g[n] * d for n, d in self.derivative.items()})


def labelled_loss_with_dropout(patch: Patch) -> None:
    patch.setattr(
        labelled_loss, "labelled_loss_modes", lambda module: {n: m.training for n, m in module.named_modules()}
    )


def labelled_loss_in_eval_mode(patch: Patch) -> None:
    patch.setattr(labelled_loss, "labelled_loss_modes", lambda module: {n: False for n, m in module.named_modules()})


def labelled_loss_by_the_model_itself(patch: Patch) -> None:
    def directly(module, images, labels, autocast):
        with replay.training_modes(module, labelled_loss.labelled_loss_modes(module)):
            loss = F.cross_entropy(module(images), labels)
        named = dict(module.named_parameters())
        return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    patch.setattr(labelled_loss, "labelled_loss_gradient", directly)


def labelled_loss_by_backward(patch: Patch) -> None:
    def backward(module, images, labels, autocast):
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        with replay.training_modes(module, labelled_loss.labelled_loss_modes(module)):
            loss = F.cross_entropy(torch.func.functional_call(module, buffers, (images,)), labels)
        module.zero_grad()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters()}

    patch.setattr(labelled_loss, "labelled_loss_gradient", backward)


def replay_updates_running_statistics(patch: Patch) -> None:
    changed_record(patch, lambda r: replace(r, buffers={}))


def sign_flipped(patch: Patch) -> None:
    original = student.directional_derivative
    patch.setattr(student, "directional_derivative", lambda *a: -original(*a))


def batch_size_forgotten(patch: Patch) -> None:
    original = student.directional_derivative
    patch.setattr(student, "directional_derivative", lambda *a: original(*a) * len(a[3]))


OFF, GUARD, STATISTICS = "gradient off by", "guard: the replayed forward differs", "running statistics moved"
MUTANTS = {
    other_masks: "guard: the network does not do the same twice",
    other_masks_unguarded: OFF,
    batch_norm_in_eval_mode: OFF,
    replay_at_the_new_weights: OFF,
    labelled_gradient_at_the_old_weights: OFF,
    sgd_derivative_on_rmsprop: OFF,
    denominator_taken_as_constant: OFF,
    last_layer_only: OFF,
    clipping_term_ignored: OFF,
    labelled_loss_with_dropout: "the random state moved",
    labelled_loss_in_eval_mode: OFF,
    labelled_loss_by_the_model_itself: STATISTICS,
    labelled_loss_by_backward: ".grad was disturbed",
    replay_updates_running_statistics: STATISTICS,
    sign_flipped: OFF,
    batch_size_forgotten: OFF,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_every_mistake_is_noticed(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """And for its own reason, not for another."""
    problem = the_problem()
    mutant(monkeypatch)
    assert str(broken(problem)).startswith(MUTANTS[mutant])


@pytest.mark.parametrize("mutant", [batch_norm_in_eval_mode, replay_at_the_new_weights])
def test_the_guard_sees_wrong_modes_and_weights(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    problem = the_problem()
    guard = derivative.check_replay
    mutant(monkeypatch)
    monkeypatch.setattr(derivative, "check_replay", guard)
    assert str(broken(problem)).startswith(GUARD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["dropout", "drop_path"])
def test_each_kind_of_mask_is_guarded(kind: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    problem = make_problem("efficientnet", dropout=kind == "dropout", drop_path=kind == "drop_path", dtype=dtype)
    step = problem.learn()
    step.target_gradient(problem.labelled, problem.labels)
    other_masks(monkeypatch)
    with pytest.raises(FeedbackError, match="differs from the recorded one"):
        step.target_gradient(problem.labelled, problem.labels)


def test_the_labelled_loss_is_free_of_dropout() -> None:
    """R of one step, asked for twice under other seeds, is one number."""
    problem = the_problem()
    step = problem.learn()
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(float(step.feedback(problem.labelled, problem.labels).labelled_loss))
    assert losses[0] == losses[1]


def test_clearing_the_gradients_before_asking_does_no_harm() -> None:
    """As a training loop of one's own may do; the clipping term needs them."""
    problem = the_problem()
    exact = problem.oracle()
    step = problem.learn()
    problem.student.optimizer.zero_grad()
    assert relative_error(step.target_gradient(problem.labelled, problem.labels), exact) < 1e-8


def test_fused_attention_serves_the_step_and_not_the_replay() -> None:
    """The step runs on the fused kernel, float32 and all; only the replay leaves it."""
    exact, fused = make_problem("vit"), make_problem("vit")
    fused.student.model.float()
    fused.images, fused.targets, fused.labelled = fused.images.float(), fused.targets.float(), fused.labelled.float()
    for state in fused.student.optimizer.state.values():
        state.update({name: value.float() for name, value in state.items() if isinstance(value, torch.Tensor)})
    assert all(block.attn.fused_attn for block in fused.student.model.blocks)
    expected = exact.oracle()
    found = fused.learn().target_gradient(fused.labelled, fused.labels)
    assert relative_error(found.double(), expected) < 1e-3
    assert torch.backends.cuda.flash_sdp_enabled()


class OwnNoise(nn.Module):
    """Draws from a generator of its own, which cannot be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(12, 3), torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape[0], 12, generator=self.generator)
        return self.linear(x.flatten(1) + noise)


class Opaque(nn.Module):
    """Ignores dual numbers, as a compiled function does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.autograd.forward_ad._current_level >= 0:
            return F.linear(x.flatten(1), self.linear.weight.detach(), self.linear.bias.detach()).data
        return self.linear(x.flatten(1))


class Square(torch.autograd.Function):
    """A custom function without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Square.apply(self.linear(x.flatten(1)))


def step_of(model: nn.Module) -> StudentStep:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 2, 2)
    return Student(model, torch.optim.SGD(model.parameters(), lr=0.1)).learn(images, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize(
    ("model", "words"), [(OwnNoise, "default generators"), (Opaque, "eager module"), (Custom, "central")]
)
def test_networks_that_cannot_be_replayed_are_refused(model: type[nn.Module], words: str) -> None:
    with pytest.raises(FeedbackError, match=words):
        step_of(model()).target_gradient(torch.randn(3, 3, 2, 2), torch.arange(3))


def test_finite_differences_serve_where_forward_mode_cannot() -> None:
    step = step_of(Custom().double().float())
    found = step.target_gradient(torch.randn(3, 3, 2, 2), torch.arange(3), engine="central")
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) > 0
