"""Train the networks of many draws side by side, with one method."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from pipeline.moons.data import Moons
from pipeline.moons.networks import Perceptrons
from pipeline.moons.settings import MethodName, MoonsSettings
from pipeline.seeds import derive_seed
from pipeline.student import Student

MEASUREMENTS = 50  # of accuracy and gradients, evenly over the training
CHUNK = 250  # steps whose random numbers are drawn together
Targets = Callable[[Tensor], Tensor]  # of points (D·B, 2), as distributions (D·B, 2)
Curve = NDArray[np.float64]


@dataclass
class Outcome:
    """The result of D draws.

    Attributes:
        accuracy: of the student at the end, over all points, percent, (D,).
        teacher_accuracy: of MPL's teacher, percent, (D,); None where there is no such network.
        steps: of the measurements, (L,).
        curve: accuracy at these steps, percent, (L, D).
        labelled_loss: of the student, on the six labels, nats, (L, D).
        cosine_labelled: between the gradients of the student's training loss and of its loss on the six labels.
        cosine_true: the same with its loss on all points and their true labels, which no method sees; (L, D).
        student: the networks at the end.
    """

    accuracy: Curve
    teacher_accuracy: Curve | None
    steps: NDArray[np.int64]
    curve: Curve
    labelled_loss: Curve
    cosine_labelled: Curve
    cosine_true: Curve
    student: Perceptrons = field(repr=False)


def train(
    method: MethodName, settings: MoonsSettings, moons: Moons, progress: Callable[[int], None] = lambda steps: None
) -> Outcome:
    """Train one method on every draw, from the same initial weights of the student for all methods.

    Every network takes `settings.steps` steps; that of Pseudo Labels after a supervised one with as many.

    Args:
        method: which.
        settings: all its numbers.
        moons: the draws.
        progress: called with the number of steps taken since its last call.
    """
    student = Perceptrons(moons.draws, settings, "student", moons.points.dtype)
    measurements = _Measurements(settings, moons, student, progress)
    match method:
        case "supervised":
            _supervised(student, settings, moons, measurements)
        case "all_labels":
            _fixed(student, settings, moons, one_hot(moons.clusters, 2), measurements)
        case "pseudo_labels":
            first = Perceptrons(moons.draws, settings, "student", moons.points.dtype)
            _supervised(first, settings, moons, lambda step, loss: None)
            predicted = _predictions(first, moons)  # (D, N)
            _fixed(student, settings, moons, one_hot(predicted, 2), measurements)
        case "uda":
            _uda(student, settings, moons, measurements)
        case "mpl" | "mpl_uda":
            teacher = Perceptrons(moons.draws, settings, "teacher", moons.points.dtype)
            _mpl(student, teacher, settings, moons, measurements, consistency=method == "mpl_uda")
            return measurements.outcome(teacher)
    return measurements.outcome(None)


Measure = Callable[[int, Callable[[], Tensor]], None]  # called with the step, and with what computes the training loss


def _supervised(network: Perceptrons, settings: MoonsSettings, moons: Moons, measure: Measure) -> None:
    """Cross-entropy of the six labels."""
    points, classes = moons.labels
    optimizer = network.optimizer(settings.lr)
    for step in range(settings.steps + 1):
        measure(step, lambda: cross_entropy(network(points), classes))
        if step < settings.steps:
            _descend(optimizer, cross_entropy(network(points), classes))


def _fixed(network: Perceptrons, settings: MoonsSettings, moons: Moons, targets: Tensor, measure: Measure) -> None:
    """A student of fixed targets, (D, N, 2): Pseudo Labels, or all true labels."""
    targets = targets.to(moons.points.dtype)
    student = Student(network, network.optimizer(settings.lr))
    all_targets = targets.flatten(0, 1)  # (D·N, 2)
    for step, (rows, points, _) in enumerate(_batches(settings, moons)):
        measure(step, lambda: soft_cross_entropy(network(moons.points.flatten(0, 1)), all_targets))
        if step < settings.steps:
            chosen = torch.gather(targets, 1, rows[..., None].expand(-1, -1, 2)).flatten(0, 1)  # (D·B, 2)
            student.learn(points, chosen, replay=False)


def _uda(network: Perceptrons, settings: MoonsSettings, moons: Moons, measure: Measure) -> None:
    """The six labels, and predictions that do not change when a point is moved a little."""
    labelled, classes = moons.labels
    optimizer = network.optimizer(settings.lr)
    all_points = moons.points.flatten(0, 1)
    generators = [torch.Generator().manual_seed(derive_seed(draw, "look")) for draw in moons.draws]
    noise = torch.cat([torch.randn(moons.points.shape[1:], generator=g) for g in generators]).to(all_points)  # (D·N, 2)
    all_moved = all_points + settings.consistency_noise * noise

    def objective(points: Tensor, moved: Tensor) -> Tensor:
        consistency = consistency_loss(network(points), network(moved), settings.temperature)
        return cross_entropy(network(labelled), classes) + settings.consistency_weight * consistency

    for step, (_, points, moved) in enumerate(_batches(settings, moons)):
        measure(step, lambda: objective(all_points, all_moved))
        if step < settings.steps:
            _descend(optimizer, objective(points, moved))


def _mpl(
    network: Perceptrons,
    teacher: Perceptrons,
    settings: MoonsSettings,
    moons: Moons,
    measure: Measure,
    *,
    consistency: bool,
) -> None:
    """A student of the teacher's labels alone; the teacher learns from its own loss and from the feedback."""
    student, optimizer = Student(network, network.optimizer(settings.lr)), teacher.optimizer(settings.lr)
    all_points = moons.points.flatten(0, 1)
    samplers = [torch.Generator().manual_seed(derive_seed(draw, "pseudo labels")) for draw in moons.draws]
    for step, (_, points, moved) in enumerate(_batches(settings, moons)):
        measure(step, lambda: soft_cross_entropy(network(all_points), teacher(all_points).detach().softmax(dim=1)))
        if step < settings.steps:
            views = (points, moved if consistency else None)
            _descend(optimizer, teacher_objective(student, teacher, views, moons.labels, settings, samplers))


def teacher_objective(
    student: Student,
    teacher: Perceptrons,
    views: tuple[Tensor, Tensor | None],
    labels: tuple[Tensor, Tensor],
    settings: MoonsSettings,
    samplers: list[torch.Generator],
) -> Tensor:
    """Let the student take its step on the teacher's labels; returns what the teacher is to descend.

    The feedback's term is a mean over draws, like every loss here. Soft: R is the mean of the draws' labelled
    losses, and the gradient of Σ q · dR/dq in the teacher is equation 3. Hard: `hard_term`.

    Args:
        student: its module are Perceptrons.
        teacher: of the same draws.
        views: unlabelled points, (D·B, 2), and the same moved at random, or None for no consistency term.
        labels: labelled points, (D·V, 2), and their classes, (D·V,).
        settings: weights and kind of the terms.
        samplers: of hard labels, one for each draw.
    """
    (points, moved), (labelled, classes) = views, labels
    network = student.module
    logits = teacher(points)  # (D·B, 2)
    q = logits.softmax(dim=1)
    hard, off = settings.feedback == "hard", settings.control == "off"
    targets = sampled(q.detach(), samplers) if hard else q
    before = labelled_losses(network, labelled, classes) if hard else None  # (D,)
    student_step = student.learn(points, targets.detach(), replay=not hard and not off)
    objective = settings.supervised_weight * cross_entropy(teacher(labelled), classes)
    if moved is not None:
        unmoved = consistency_loss(logits, teacher(moved), settings.temperature)
        objective = objective + settings.consistency_weight * unmoved
    if off:
        return objective
    if before is not None:
        term = hard_term(logits, targets, before - labelled_losses(network, labelled, classes))
    else:
        term = (q * student_step.target_gradient(labelled, classes)).sum()
    return objective + settings.feedback_weight * (-term if settings.control == "flipped" else term)


def sampled(q: Tensor, samplers: list[torch.Generator]) -> Tensor:
    """ŷ ~ Cat(q) as one-hot rows, (D·B, 2)."""
    chance = torch.cat([torch.rand(len(q) // len(samplers), generator=g) for g in samplers])  # (D·B,)
    return one_hot((chance < q[:, 1]).long(), 2).to(q)


@torch.no_grad()
def labelled_losses(network: torch.nn.Module, points: Tensor, classes: Tensor) -> Tensor:
    """R of every draw, nats, (D,), of Perceptrons."""
    assert isinstance(network, Perceptrons)
    return cross_entropy(network(points), classes, reduction="none").view(network.draws, -1).mean(dim=1)


def hard_term(logits: Tensor, labels: Tensor, h: Tensor) -> Tensor:
    """Mean over the draws of h · Σ CE(ŷ, T(x)), with h = R before the student's step − R after it, (D,)."""
    losses = -(labels * log_softmax(logits, dim=1)).sum(dim=1).view(len(h), -1).sum(dim=1)  # (D,)
    return (h * losses).mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−mean over the rows of Σ_c targets_c log p_c, nats."""
    return -(targets * log_softmax(logits, dim=1)).sum(dim=1).mean()


def consistency_loss(logits: Tensor, moved: Tensor, temperature: float) -> Tensor:
    """UDA: the sharpened distribution at the points, not differentiated, teaches the one at the moved points."""
    return soft_cross_entropy(moved, (logits.detach() / temperature).softmax(dim=1))


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _batches(settings: MoonsSettings, moons: Moons) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows (D, B), their points (D·B, 2), and these moved at random, for every step and the measurement after the last.

    A draw's random numbers do not depend on the other draws.
    """
    generators = [torch.Generator().manual_seed(derive_seed(draw, "batches")) for draw in moons.draws]
    shape, n = (CHUNK, settings.batch), moons.points.shape[1]
    for begin in range(0, settings.steps + 1, CHUNK):
        rows = torch.stack([torch.randint(n, shape, generator=g) for g in generators], dim=1)  # (chunk, D, B)
        noise = torch.stack([torch.randn(*shape, 2, generator=g) for g in generators], dim=1)
        noise = (settings.consistency_noise * noise.to(moons.points.dtype)).flatten(1, 2)  # (chunk, D·B, 2)
        for chosen, away in zip(rows[: settings.steps + 1 - begin], noise, strict=False):
            points, _ = moons.rows(chosen)
            yield chosen, points, points + away


@torch.no_grad()
def _predictions(network: Perceptrons, moons: Moons) -> Tensor:
    """Classes of all points, (D, N)."""
    return network(moons.points.flatten(0, 1)).argmax(dim=1).view(moons.clusters.shape)


def accuracy(network: Perceptrons, moons: Moons) -> Curve:
    """Over all points, percent, (D,)."""
    return 100 * (_predictions(network, moons) == moons.clusters).double().mean(dim=1).numpy()


def gradient(network: Perceptrons, loss: Tensor) -> Tensor:
    """Of a loss that is a mean over draws: each draw's, up to a factor, (D, parameters)."""
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([values.flatten(1) for values in gradients], dim=1)


class _Measurements:
    """Accuracy and gradients of the student during its training."""

    def __init__(
        self, settings: MoonsSettings, moons: Moons, student: Perceptrons, progress: Callable[[int], None]
    ) -> None:
        self.moons, self.student, self.progress = moons, student, progress
        self.due = {round(i * settings.steps / MEASUREMENTS) for i in range(MEASUREMENTS + 1)}
        self.steps: list[int] = []
        self.rows: list[list[Curve]] = []
        self.last = 0

    def __call__(self, step: int, training_loss: Callable[[], Tensor]) -> None:
        if step not in self.due:
            return
        moons, student = self.moons, self.student
        points, classes = moons.labels
        losses = labelled_losses(student, points, classes)
        training = gradient(student, training_loss())
        labelled = gradient(student, cross_entropy(student(points), classes))
        true = gradient(student, cross_entropy(student(moons.points.flatten(0, 1)), moons.clusters.flatten()))
        self.steps.append(step)
        self.rows.append([
            accuracy(student, moons), losses.double().numpy(), cosine(training, labelled), cosine(training, true)
        ])  # fmt: skip
        self.progress(step - self.last)
        self.last = step

    def outcome(self, teacher: Perceptrons | None) -> Outcome:
        """All measurements."""
        curve, loss, labelled, true = (np.stack(values) for values in zip(*self.rows, strict=True))  # (L, D) each
        teacher_accuracy = accuracy(teacher, self.moons) if teacher is not None else None
        return Outcome(curve[-1], teacher_accuracy, np.array(self.steps), curve, loss, labelled, true, self.student)


def cosine(a: Tensor, b: Tensor) -> Curve:
    """Row by row, (D,)."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1, eps=1e-300).numpy()


@torch.no_grad()
def regions(student: Perceptrons, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
    """Probability of class 1 on a grid, for every draw, (D, len(y), len(x))."""
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)  # (len(y)·len(x), 2)
    points = torch.from_numpy(grid).to(next(student.parameters()).dtype).repeat(student.draws, 1)
    return student(points).softmax(dim=1)[:, 1].view(student.draws, len(y), len(x)).float().numpy()
