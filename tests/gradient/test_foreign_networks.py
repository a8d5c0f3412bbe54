"""Other people's networks and loops: the gradient is right, or it is refused; never wrong without a word."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import FeedbackError, NonFiniteError, UsageError
from pipeline.student import Student
from tests.problems import BATCH, CLASSES, LABELLED, Problem, make_problem, optimizer_of, relative_error


class Plain(nn.Module):
    """A convolution, a batch normalisation that is applied twice, two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 1)
        self.weight, self.head = nn.Parameter(torch.randn(8, 4) / 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.convolution(x)))
        x = F.silu(self.norm(self.mix(x))).mean((2, 3))  # (B, 4)
        x = F.linear(x, self.weight)
        x = torch.tanh(F.linear(torch.tanh(x), self.weight.T))
        return self.head(torch.cat([x, x.square()], 1))


class Tied(nn.Module):
    """The same function: modules under two names, and a parameter that hangs on two modules."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.stem = nn.Sequential(plain.convolution, plain.norm)
        self.mix = nn.Sequential(plain.mix, plain.norm)
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.ParameterList([plain.weight])
        self.up.weight = plain.weight
        self.body = nn.ModuleDict({"head": plain.head})
        self.head = plain.head  # as `self.head = self.net.fc`

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.mix(F.silu(self.stem(x)))).mean((2, 3))
        x = torch.tanh(F.linear(torch.tanh(self.up(x)), self.down[0].T))
        return self.head(torch.cat([x, x.square()], 1))


def problem_of(build: Callable[[], nn.Module], rule: str, clip_norm: float | None = None) -> Problem:
    torch.manual_seed(5)
    model = build().double().train()
    torch.manual_seed(6)
    images, targets = torch.randn(BATCH, 3, 32, 32).double(), torch.randn(BATCH, CLASSES).double().softmax(1)
    labelled, labels = torch.randn(LABELLED, 3, 32, 32).double(), torch.arange(LABELLED) % CLASSES
    student = Student(model, optimizer_of(rule, model, 1e-2), clip_norm=clip_norm)
    return Problem(student, images, targets, labelled, labels)


@pytest.mark.parametrize(("rule", "clip_norm"), [("adamw", 0.1), ("nesterov", None), ("rmsprop_tf", 0.1)])
def test_what_is_reachable_by_two_names(rule: str, clip_norm: float | None) -> None:
    """Oracles: double backward on the plain twin; and the twin's training, step by step, feedback in between."""
    plain, tied = (problem_of(build, rule, clip_norm) for build in (Plain, lambda: Tied(Plain())))
    expected = plain.oracle()
    for step in range(3):
        found = [p.learn().target_gradient(p.labelled, p.labels) for p in (plain, tied)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)
        if step == 0:
            assert relative_error(found[1], expected) < 1e-9
    ours, theirs = tied.student.model, plain.student.model
    assert ours.head is ours.body["head"]
    assert ours.up.weight is ours.down[0]
    assert ours.stem[1] is ours.mix[1]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in ours.parameters())
    pairs = [(ours.head.weight, theirs.head.weight), (ours.up.weight, theirs.weight)]
    pairs += [(ours.stem[1].running_var, theirs.norm.running_var), (ours.stem[0].weight, theirs.convolution.weight)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_an_optimiser_over_part_of_the_parameters(rule: str) -> None:
    """The others are clipped with them, and so take part in the gradient."""
    problem = make_problem("resnet", "sgd", clip=True, warm=False)
    model = problem.student.model
    some = nn.ModuleList([model.layer1, model.fc])
    problem.student.optimizer = optimizer_of(rule, some, 1e-2)
    exact = problem.oracle()
    found = problem.learn().target_gradient(problem.labelled, problem.labels)
    assert relative_error(found, exact) < 1e-9


def hooked(problem: Problem, kind: str) -> None:
    model, optimizer = problem.student.model, problem.student.optimizer

    def doubled(*_: object) -> None:
        model.fc.weight.grad.mul_(2)

    if kind == "parameter":
        model.fc.weight.register_hook(lambda gradient: 2 * gradient)
    elif kind == "after accumulation":
        model.fc.weight.register_post_accumulate_grad_hook(doubled)
    elif kind == "module":
        model.fc.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    elif kind == "before the step":
        optimizer.register_step_pre_hook(doubled)
    else:
        optimizer.register_step_post_hook(doubled)


@pytest.mark.parametrize("kind", ["parameter", "after accumulation", "module", "before the step", "after the step"])
def test_hooks_are_refused_while_feedback_is_asked_for(kind: str) -> None:
    problem = make_problem()
    hooked(problem, kind)
    before = problem.student.model.fc.weight.detach().clone()
    with pytest.raises(FeedbackError, match="has a hook, which may change the gradient or the step"):
        problem.learn()
    assert torch.equal(before, problem.student.model.fc.weight)
    assert problem.learn(replay=False).loss > 0


def test_a_hook_that_only_looks_says_so() -> None:
    problem, seen = make_problem(), []

    def looks(gradient: Tensor) -> None:
        seen.append(gradient.norm())

    looks.observes = True  # type: ignore[attr-defined]
    problem.student.model.fc.weight.register_hook(looks)
    exact = problem.oracle()
    assert relative_error(problem.learn().target_gradient(problem.labelled, problem.labels), exact) < 1e-9
    assert seen


def test_a_step_of_the_callers_own_in_between_is_noticed() -> None:
    problem = make_problem()
    step = problem.learn()
    problem.student.optimizer.step()
    with pytest.raises(FeedbackError, match="weights were changed since this step, not by learn"):
        step.target_gradient(problem.labelled, problem.labels)
    step = problem.learn()
    first = step.target_gradient(problem.labelled, problem.labels)
    assert torch.equal(first, step.target_gradient(problem.labelled, problem.labels))  # asking changes nothing


def test_the_weight_of_rows_is_that_of_the_step() -> None:
    problem = make_problem()
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0]).double()
    exact = problem.oracle(weight=weight.clone())
    step = problem.learn(weight=weight)
    weight.zero_()
    assert relative_error(step.target_gradient(problem.labelled, problem.labels), exact) < 1e-9
    for wrong in (torch.ones(BATCH, 1), torch.ones(BATCH - 1), torch.ones(())):
        with pytest.raises(UsageError, match=r"weight must be \(B,\) = \(4,\)"):
            problem.learn(weight=wrong)


def test_a_labelled_image_that_is_not_finite_is_an_error() -> None:
    problem = make_problem()
    step = problem.learn()
    problem.labelled[1, 0, 3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="the labelled loss is nan"):
        step.target_gradient(problem.labelled, problem.labels)


class Returns(nn.Module):
    """A network that returns something else than logits."""

    def __init__(self, network: nn.Module, how: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.how = network, how

    def forward(self, x: Tensor) -> object:
        return self.how(self.network(x))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda logits: (logits, logits), "returned tuple"),
        (lambda logits: {"logits": logits}, "returned dict"),
        (lambda logits: logits[:, None], r"returned a tensor of shape \(4, 1, 5\)"),
    ],
)
def test_outputs_that_are_no_logits(how: Callable[[Tensor], object], words: str) -> None:
    problem = make_problem()
    problem.student.model = Returns(problem.student.model, how)
    with pytest.raises(UsageError, match=words):
        problem.learn()


def test_arguments_of_a_wrong_shape_are_named() -> None:
    problem = make_problem()
    student, images, targets = problem.student, problem.images, problem.targets
    with pytest.raises(UsageError, match="at least one image"):
        student.learn(images[:0], targets[:0])
    with pytest.raises(UsageError, match=r"targets must be \(B, C\) = \(4, C\), and are \(3, 5\)"):
        student.learn(images, targets[:3])
    step = problem.learn()
    with pytest.raises(UsageError, match="at least one labelled image"):
        step.target_gradient(problem.labelled[:0], problem.labels[:0])
    with pytest.raises(UsageError, match="soft labels is not implemented"):
        step.target_gradient(problem.labelled, targets[:LABELLED])
    with pytest.raises(UsageError, match="labels must be class indices"):
        step.target_gradient(problem.labelled, problem.labels[:2])


# --- what cannot be run again as it was --------------------------------------------------------------------


class Drawing(nn.Module):
    """Drops activations by numbers from somewhere; the head may start at zero, so that no logit shows it."""

    def __init__(self, source: str, zero_head: bool) -> None:
        super().__init__()
        self.source, self.calls = source, 0
        self.generator, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, CLASSES)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        self.calls += 1
        if self.source == "torch's default generator":
            x = F.dropout(x, 0.3)
        elif self.source == "a torch.Generator":
            x = x * (torch.rand(x.shape, generator=self.generator) > 0.1)
        elif self.source == "a generator of NumPy":
            x = x * torch.from_numpy(self.numpy.random(x.shape[1]) > 0.3)[:, None, None]
        elif self.source == "NumPy":
            x = x if np.random.random() < 0.9 else 0 * x
        elif self.source == "Python":
            x = x if random.random() < 0.9 else 0 * x
        else:
            x = x * (1 + 0.01 * self.calls)
        return self.head(F.relu(self.second(x)).mean((2, 3)))


SOURCES = ["a torch.Generator", "a generator of NumPy", "NumPy", "Python", "a counter"]


@pytest.mark.parametrize("zero_head", [False, True], ids=["", "head at zero"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_network_that_does_not_do_the_same_twice(source: str, precision: torch.dtype, zero_head: bool) -> None:
    torch.manual_seed(0)
    model = Drawing(source, zero_head).train()
    before = model.second.weight.detach().clone()
    student = Student(model, torch.optim.SGD(model.parameters(), 0.1), autocast=precision)
    words = "from Python or NumPy" if source in ("NumPy", "Python") else "not do the same twice: second differs"
    with pytest.raises(FeedbackError, match=words):
        student.learn(torch.randn(8, 3, 16, 16), torch.rand(8, CLASSES).softmax(1))
    assert torch.equal(model.second.weight, before)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_masks_of_torchs_own_generator_are_welcome(precision: torch.dtype) -> None:
    """And what is tried out leaves the training as it is."""
    states = []
    for replay in (True, False):
        torch.manual_seed(0)
        model = Drawing("torch's default generator", zero_head=True).train()
        student = Student(model, torch.optim.SGD(model.parameters(), 0.1), autocast=precision)
        for _ in range(3):
            student.learn(torch.randn(8, 3, 16, 16), torch.rand(8, CLASSES).softmax(1), replay=replay)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant  # None: not checkpointed
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self._middle(x).mean((2, 3)))

    def _middle(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self._rest(x)
        return checkpoint(self._rest, x, use_reentrant=self.use_reentrant)

    def _rest(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_activations() -> None:
    """Oracle: double backward on the twin without checkpoints, which it cannot see through."""
    right = problem_of(lambda: Checkpointed(False), "sgd")
    exact = problem_of(lambda: Checkpointed(None), "sgd").oracle()
    if torch.__version__.startswith("2.8."):  # there it is a custom function without a derivative, and said
        with pytest.raises(FeedbackError, match=r"on torch 2\.9 or newer"):
            right.learn().target_gradient(right.labelled, right.labels)
    else:
        assert relative_error(right.learn().target_gradient(right.labelled, right.labels), exact) < 1e-9
    other = problem_of(lambda: Checkpointed(True), "sgd")
    step = other.learn()
    with pytest.raises(FeedbackError, match="set use_reentrant=False"):
        step.target_gradient(other.labelled, other.labels)


def test_a_compiled_network_with_masks_of_its_own() -> None:
    """By a backend that only draws: what is compared is what inductor does with dropout."""
    torch.manual_seed(0)
    model = Drawing("torch's default generator", zero_head=False).train()

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)  # the masks are others
            return self._orig_mod(x)

    student = Student(Compiled(), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(FeedbackError, match="fallback_random = True"):
        student.learn(torch.randn(8, 3, 16, 16), torch.rand(8, CLASSES).softmax(1))


@pytest.mark.parametrize("labelled", [1, 2])
def test_one_image_that_a_batch_normalisation_cannot_use(labelled: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES)).train()
    student = Student(model, torch.optim.SGD(model.parameters(), 0.1))
    targets = torch.rand(2, CLASSES).softmax(1)
    with pytest.raises(UsageError, match=r"one value per channel.*1 image\(s\) of 8 × 8 pixels"):
        student.learn(torch.randn(1, 3, 8, 8), targets[:1])
    step = student.learn(torch.randn(2, 3, 8, 8), targets)
    if labelled == 1:
        with pytest.raises(UsageError, match="one value per channel"):
            step.target_gradient(torch.randn(1, 3, 8, 8), torch.tensor([0]))
    else:
        assert step.target_gradient(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).isfinite().all()
