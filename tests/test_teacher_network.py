"""Full Meta Pseudo Labels: both kinds of feedback against literal oracles, in float64, and their traps."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import teacher_network
from pipeline.batches import Labelled, ViewBatch
from pipeline.config import MplFeedbackSettings
from pipeline.data.augment.draws import Draws
from pipeline.distributed.placement import Placement
from pipeline.errors import NonFiniteError
from pipeline.methods import Views, parse_method
from pipeline.student import Student
from pipeline.teacher_network import Forward, ForwardInParts, TeacherNetwork, TeacherRule
from pipeline.training import train_step
from tests.oracles.double_backward import step_and_loss, teacher_gradient
from tests.problems import optimizer_of, relative_error

CLASSES, POOL, LABELLED = 3, 3, 4
RULES = ("sgd", "momentum", "nesterov", "rmsprop", "rmsprop_tf", "adamw")
Patch = pytest.MonkeyPatch


def network(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(36, 3)]
    return nn.Sequential(*layers).double().train()


class World:
    """A teacher and a student before one step; every call begins from the same state."""

    def __init__(
        self,
        rule: str = "rmsprop_tf",
        method: str = "uda",
        *,
        dropout: float = 0.0,
        micro_batches: int = 1,
        rate: float | None = None,
        **options: float | str,
    ) -> None:
        self.rate = rate
        self.rule, self.method, self.dropout, self.micro_batches = rule, method, dropout, micro_batches
        self.options = MplFeedbackSettings(**{"scale": "raw", **options})
        torch.manual_seed(5)
        images = torch.randn(4, POOL, 3, 8, 8, dtype=torch.float64)
        self.pool, self.weak = images[0], images[1]
        self.labelled = torch.randn(2, LABELLED, 3, 8, 8, dtype=torch.float64)
        self.labels = torch.arange(LABELLED) % CLASSES
        self.warm_images, self.warm_targets = images[2], torch.randn(POOL, CLASSES, dtype=torch.float64).softmax(1)

    def student(self) -> Student:
        model = network(1)
        student = Student(model, optimizer_of(self.rule, model, 1e-2))
        for group in student.optimizer.param_groups:
            group["lr"] = self.rate or group["lr"]
        student.learn(self.warm_images, self.warm_targets, replay=False)  # moments that are not fresh
        return student

    def teacher(self, feedback: str, *, clip_norm: float | None = None, **changed: float) -> TeacherNetwork:
        model = network(2, self.dropout)
        options = self.options.model_copy(update=changed)
        rule = TeacherRule(parse_method(self.method), feedback, options, lambda step: 1e-3, clip_norm)
        placement = Placement(micro_batches=self.micro_batches)
        return TeacherNetwork(model, torch.optim.SGD(model.parameters(), lr=1e-3), rule, placement)

    def batch(self) -> ViewBatch:
        targets = F.one_hot(self.labels, CLASSES).double()
        views = Views(0, self.labelled[0], targets, None, torch.rand(LABELLED), self.pool, self.weak)
        return ViewBatch(self.pool, views)

    def one_step(self, feedback: str, **changed: float) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The teacher's gradient after one step of the loop, and its metrics."""
        student, teacher, batch = self.student(), self.teacher(feedback, **changed), self.batch()
        labelled = Labelled(self.labelled[1], self.labels)
        wish = teacher.wish(0)
        torch.manual_seed(9)
        metrics = train_step(student, teacher, batch, labelled if wish != "nothing" else None, wish)
        return [p.grad.clone() for p in teacher.model.parameters()], metrics

    def feedback_gradient(self, feedback: str, **changed: float) -> list[Tensor]:
        """The feedback's part of it: with it, minus without."""
        whole, _ = self.one_step(feedback, **changed)
        without, _ = self.one_step(feedback, weight=0.0)
        return [a - b for a, b in zip(whole, without, strict=True)]

    def probabilities(self, model: nn.Module) -> Tensor:
        """T(x) of the student's images inside the teacher's batch (batch statistics!), differentiable, (U, C)."""
        torch.manual_seed(9)
        rows = [self.labelled[0], self.pool]
        if "pool_weak" in parse_method(self.method).needs:
            with torch.no_grad():
                model(self.weak)  # draws the masks of the view that the method predicts
        if self.method == "pseudo_labels":
            rows.insert(1, self.weak)
        return model(torch.cat(rows)).softmax(1)[-POOL:]

    def problem(self) -> tuple:
        """What the oracle needs: the student before its step."""
        student = self.student()
        return student.model, student.optimizer, self.pool, self.labelled[1], self.labels


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients])


@pytest.mark.parametrize("method", ["supervised", "pseudo_labels", "uda", "fixmatch"])
@pytest.mark.parametrize("rule", RULES)
def test_soft_feedback_is_equation_3(rule: str, method: str) -> None:
    """Oracle: ∇_Ψ R through the whole optimiser step, from the equation alone."""
    world = World(rule, method, dropout=0.3)
    model = world.teacher("soft").model
    net, optimizer, images, labelled, labels = world.problem()
    exact = teacher_gradient(
        lambda: world.probabilities(model), list(model.parameters()), net, optimizer, images, labelled, labels
    )
    assert relative_error(flat(world.feedback_gradient("soft")), flat(exact)) < 1e-9


def enumerated(world: World) -> Tensor:
    """∇_Ψ Σ_ŷ T(ŷ) · R(θ'(ŷ)) over all assignments of labels to the batch."""
    model = world.teacher("hard").model
    net, optimizer, images, labelled, labels = world.problem()
    q = world.probabilities(model)
    expected = torch.zeros((), dtype=torch.float64)
    for classes in itertools.product(range(CLASSES), repeat=POOL):
        hot = F.one_hot(torch.tensor(classes), CLASSES).double()
        loss, _ = step_and_loss(net, optimizer, images, hot, labelled, labels)
        expected = expected + (q * hot).sum(1).prod() * loss.detach()
    return flat(list(torch.autograd.grad(expected, list(model.parameters()))))


def sampled_mean(world: World, patch: Patch) -> Tensor:
    """Mean of the loop's gradient over all draws of labels."""
    return moments(world, patch)[0]


def moments(world: World, patch: Patch) -> tuple[Tensor, float]:
    """The same, and the mean square of its norm: over the sampler's numbers, one in the middle of each interval."""
    q = world.probabilities(world.teacher("hard").model).detach()
    ends = q.cumsum(1)
    middle = ends - q / 2
    mean, square = torch.zeros(1, dtype=torch.float64), 0.0
    for classes in itertools.product(range(CLASSES), repeat=POOL):
        rows = torch.arange(POOL), torch.tensor(classes)
        patch.setattr(Draws, "uniform", lambda *_, rows=rows: middle[rows])
        found = flat(world.feedback_gradient("hard"))
        mean = mean + q[rows].prod() * found
        square += float(q[rows].prod() * found.square().sum())
    return mean, square


@pytest.mark.parametrize("rule", ["sgd", "momentum", "rmsprop"])
def test_hard_feedback_is_right_on_average(rule: str, monkeypatch: Patch) -> None:
    world = World(rule)
    assert relative_error(sampled_mean(world, monkeypatch), enumerated(world)) < 1e-9


def test_credit_of_each_row_is_right_but_for_the_students_rate_and_has_less_noise(monkeypatch: Patch) -> None:
    """Oracle: all assignments of labels. The error falls with the rate; without a rate nothing would be left of it."""
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        world = World("sgd", rate=rate, credit="row")
        errors.append(relative_error(sampled_mean(world, monkeypatch), enumerated(world)))
    assert errors[0] < 0.2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.5)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.5)
    noise = []
    for credit in ("batch", "row"):
        mean, square = moments(World("sgd", rate=1e-4, credit=credit), monkeypatch)
        noise.append(square - float(mean.square().sum()))
    assert noise[1] < noise[0] / 4  # of three rows; h lays the noise of all on every one


def test_credit_of_rows_has_its_controls_and_scale() -> None:
    world = World("sgd", credit="row")
    exact = flat(world.feedback_gradient("hard"))
    assert float(exact.abs().max()) > 0
    assert relative_error(flat(world.feedback_gradient("hard", control="flipped")), -exact) < 1e-12
    assert relative_error(flat(world.feedback_gradient("hard", scale="paper")), exact / POOL) < 1e-12
    assert world.teacher("hard").wish(0) == "gradient"
    assert world.teacher("hard", credit="batch").wish(0) == "losses"


def flipped(patch: Patch) -> None:
    original = Student.learn

    def learn(*args, **kwargs):
        step = original(*args, **kwargs)
        if step.labelled_losses is not None:
            step.labelled_losses = step.labelled_losses[::-1]
        return step

    patch.setattr(Student, "learn", learn)


def another_view(patch: Patch) -> None:
    original = TeacherNetwork.propose

    def propose(self, batch):
        return replace(original(self, batch), log_p=self.model(batch.views.pool_weak).log_softmax(1))

    patch.setattr(TeacherNetwork, "propose", propose)


def argmax(patch: Patch) -> None:
    patch.setattr(TeacherNetwork, "_sample", lambda self, q, step: F.one_hot(q.argmax(1), CLASSES).to(q))


def own_soft_labels(patch: Patch) -> None:
    original = TeacherNetwork._hard_feedback

    def feedback(self, proposal, step, labelled):
        return original(self, replace(proposal, targets=proposal.log_p.exp().detach()), step, labelled)

    patch.setattr(TeacherNetwork, "_hard_feedback", feedback)


def mean_over_the_batch(patch: Patch) -> None:
    patch.setattr(teacher_network, "feedback_scale", lambda step, settings, batch: 1 / batch)


MISTAKES: list[Callable[[Patch], None]] = [flipped, another_view, argmax, own_soft_labels, mean_over_the_batch]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_mistakes_with_hard_labels_are_noticed(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    world = World("sgd")
    exact = enumerated(world)
    mistake(monkeypatch)
    found = sampled_mean(world, monkeypatch)
    assert relative_error(found, exact) > 0.05
    if mistake is own_soft_labels:  # softmax − softmax: the best-known public code learns nothing from it
        assert float(found.abs().max()) < 1e-12


def test_mistakes_with_soft_labels_are_noticed() -> None:
    world = World()
    exact = flat(world.feedback_gradient("soft"))
    for control in ("flipped", "shuffled"):
        assert relative_error(flat(world.feedback_gradient("soft", control=control)), exact) > 0.05
    assert relative_error(flat(world.feedback_gradient("soft", control="flipped")), -exact) < 1e-12


def test_labels_are_sampled_by_their_probability_and_by_the_step() -> None:
    teacher = World().teacher("hard")
    q = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0], [0.25, 0.5, 0.25]], dtype=torch.float64)
    drawn = torch.stack([teacher._sample(q, step) for step in range(4000)])
    torch.testing.assert_close(drawn.mean(0), q, atol=0.03, rtol=0)
    assert torch.equal(drawn.sum(2), torch.ones(4000, 3, dtype=torch.float64))
    assert torch.equal(teacher._sample(q, 7), drawn[7])


def test_the_moving_baseline_excludes_the_present_h() -> None:
    """With it the first step is as without; and the second h is compared with the first."""
    world = World("sgd")
    plain, with_baseline = world.one_step("hard")[0], world.one_step("hard", baseline=0.9)[0]
    assert torch.equal(flat(plain), flat(with_baseline))
    teacher = world.teacher("hard", baseline=0.9)
    student, batch, labelled = world.student(), world.batch(), Labelled(world.labelled[1], world.labels)
    seen = []
    for _ in range(3):
        moving = teacher.moving
        seen.append((moving, float(train_step(student, teacher, batch, labelled, "losses")["h"])))
    (start, h0), (first, h1), (second, _) = seen
    assert start is None
    assert first == h0
    assert second == pytest.approx(0.9 * h0 + 0.1 * h1, rel=1e-12)


def test_feedback_scaled_per_image_does_not_depend_on_the_learning_rate() -> None:
    """dR/dq · B/η."""
    world = World("sgd", scale="raw")
    raw = flat(world.feedback_gradient("soft"))
    assert relative_error(flat(world.feedback_gradient("soft", scale="per_image")), raw * POOL / 0.05) < 1e-12


def test_the_papers_scale_takes_the_mean_of_hard_labels_over_the_batch() -> None:
    """Of soft ones it is equation 3."""
    raw, paper = World("sgd", scale="raw"), World("sgd", scale="paper")
    hard = flat(raw.feedback_gradient("hard"))
    assert float(hard.abs().max()) > 0
    assert relative_error(flat(paper.feedback_gradient("hard")), hard / POOL) < 1e-12
    assert relative_error(flat(paper.feedback_gradient("soft")), flat(raw.feedback_gradient("soft"))) < 1e-12


def test_a_waiting_student_gives_no_feedback() -> None:
    world = World()
    teacher, batch = world.teacher("soft"), world.batch()
    metrics = teacher.adapt(teacher.propose(batch), None, None)
    assert set(metrics) == {"teacher_loss", "teacher_pool_share"}


@pytest.mark.parametrize("feedback", ["soft", "hard"])
def test_micro_batches_give_the_same_gradient(feedback: str, monkeypatch: Patch) -> None:
    """Without batch statistics, to rounding: parts go forward twice, under the same masks."""
    monkeypatch.setattr(
        nn.BatchNorm2d, "forward", lambda self, x: x * self.weight[:, None, None] + self.bias[:, None, None]
    )
    whole, _ = World("rmsprop_tf").one_step(feedback)
    parts, _ = World("rmsprop_tf", micro_batches=3).one_step(feedback)
    assert relative_error(flat(parts), flat(whole)) < 1e-12


def test_micro_batches_replay_masks_and_leave_running_statistics_alone() -> None:
    """One part that is computed twice equals the plain way, dropout and batch statistics included."""
    results = []
    torch.manual_seed(5)
    images, targets = torch.randn(6, 3, 8, 8).double(), torch.randn(6, CLASSES).double().softmax(1)
    for parts in (0, 1):
        model = network(2, dropout=0.5)
        torch.manual_seed(4)
        forward = ForwardInParts(model, images, None, 1) if parts else Forward(model(images).log_softmax(1))
        after_forward = torch.get_rng_state()
        forward.backward(-(targets * forward.log_p).sum())
        assert torch.equal(torch.get_rng_state(), after_forward)
        statistics = [b.clone() for b in model.buffers()]
        results.append((flat([p.grad for p in model.parameters()]), statistics))
    (whole, before), (again, after) = results
    assert relative_error(again, whole) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_state_goes_round() -> None:
    world = World()
    teacher = world.teacher("hard", baseline=0.5)
    teacher.moving = 0.25
    other = world.teacher("hard", baseline=0.5)
    other.load_values(json.loads(json.dumps(teacher.values())))
    assert other.moving == 0.25
    assert teacher.networks() == {"teacher": (teacher.model, teacher.optimizer)}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_update(clip_norm: float | None) -> None:
    """The objective may be finite where its gradient is not."""
    world = World()
    teacher, batch = world.teacher("none", clip_norm=clip_norm), world.batch()
    first = next(teacher.model.parameters())
    before = first.detach().clone()
    first.register_hook(lambda g: g * float("inf"))
    proposal = teacher.propose(batch)
    with pytest.raises(NonFiniteError, match="the teacher's gradient is"):
        teacher.adapt(proposal, None, None)
    assert torch.equal(first.detach(), before)
