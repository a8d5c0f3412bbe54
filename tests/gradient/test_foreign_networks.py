"""Other people's networks and loops: the gradient is right, or it is refused; never wrong without a word."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
