"""The two moons: data, the bundle of draws, MPL's gradient, and the command."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons as sklearn_moons
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from pipeline.errors import RunError
from pipeline.moons.data import Moons, make_moons
from pipeline.moons.networks import Perceptrons
from pipeline.moons.settings import EVERY, WORKING, MethodName, MoonsSettings
from pipeline.moons.study import Cell, CellResult, Row, RunCell, rows
from pipeline.moons.train import cosine, gradient, hard_term, sampled, teacher_objective, train
from pipeline.report.experiments.moons import MoonsReport, discordant, left_plateau
from pipeline.report.experiments.moons_figure import smooth
from pipeline.report.experiments.report import About
from pipeline.student import Student

TINY = WORKING.model_copy(update={"steps": 12, "points": 40, "batch": 5})
DRAWS = (3, 0, 7)


def parameters_of(network: Perceptrons, draw: int) -> list[Tensor]:
    """One draw's own weights and biases, layer by layer."""
    pairs = zip(network.weights, network.biases, strict=True)
    return [p[draw].detach().clone().requires_grad_() for pair in pairs for p in pair]


def logits_of(parameters: list[Tensor], points: Tensor) -> Tensor:
    """A perceptron as the paper describes it, of one draw."""
    w1, b1, w2, b2, w3, b3 = parameters
    return torch.sigmoid(torch.sigmoid(points @ w1 + b1) @ w2 + b2) @ w3 + b3


def problem(settings: MoonsSettings) -> tuple[Moons, Student, Perceptrons, Tensor]:
    moons = make_moons(DRAWS, settings, torch.float64)
    network = Perceptrons(DRAWS, settings, "student", torch.float64)
    teacher = Perceptrons(DRAWS, settings, "teacher", torch.float64)
    points = moons.points[:, ::9]  # (D, B, 2)
    return moons, Student(network, network.optimizer(settings.lr)), teacher, points


def literal_feedback(
    student: list[Tensor], teacher: list[Tensor], points: Tensor, labelled: Tensor, classes: Tensor, lr: float
) -> list[Tensor]:
    """∇_Ψ R(θ − η ∇_θ CE(q_Ψ, p_θ)), equation 3, by autograd through the update of one draw alone."""
    q = logits_of(teacher, points).softmax(1)
    loss = -(q * log_softmax(logits_of(student, points), 1)).sum(1).mean()
    after = [p - lr * g for p, g in zip(student, torch.autograd.grad(loss, student, create_graph=True), strict=True)]
    return list(torch.autograd.grad(cross_entropy(logits_of(after, labelled), classes), teacher))


def test_hard_labels_follow_the_distribution() -> None:
    q = torch.tensor([0.2, 0.7]).repeat_interleave(20_000)
    labels = sampled(torch.stack([1 - q, q], dim=1), [torch.Generator().manual_seed(d) for d in range(2)])
    assert torch.equal(labels.sum(1), torch.ones(40_000))
    np.testing.assert_allclose(labels[:, 1].view(2, -1).mean(1).numpy(), [0.2, 0.7], atol=0.015)


@pytest.mark.parametrize("control", ["none", "flipped"])
def test_the_teacher_gets_equation_3_in_every_draw(control: str) -> None:
    """Oracle: double backward, draw by draw; a flipped sign shows."""
    settings = TINY.model_copy(update={"supervised_weight": 0.0, "feedback_weight": 2.5, "lr": 0.7, "control": control})
    moons, student, teacher, points = problem(settings)
    thetas = [parameters_of(student.model, d) for d in range(len(DRAWS))]
    objective = teacher_objective(student, teacher, (points.flatten(0, 1), None), moons.labels, settings, [])
    objective.backward()
    labelled, classes = (part.unflatten(0, (len(DRAWS), -1)) for part in moons.labels)
    sign = 1.0 if control == "none" else -1.0
    for d, theta in enumerate(thetas):
        expected = literal_feedback(theta, parameters_of(teacher, d), points[d], labelled[d], classes[d], 0.7)
        pairs = zip(teacher.weights, teacher.biases, strict=True)
        found = [len(DRAWS) * p.grad[d] for pair in pairs for p in pair]  # the objective is a mean over draws
        for a, b in zip(found, expected, strict=True):
            assert float(b.norm()) > 1e-9
            torch.testing.assert_close(a, sign * 2.5 * b, rtol=1e-8, atol=1e-15)


def test_hard_feedback_is_right_on_average() -> None:
    """Oracle: all 16 labellings of four points, weighted by their probability: ∇_Ψ E[R(θ'(ŷ))]."""
    settings = TINY.model_copy(update={"lr": 2.0})
    moons, student, teacher, points = problem(settings)
    theta, psi, x = parameters_of(student.model, 0), parameters_of(teacher, 0), points[0, :4]
    labelled, classes = (part.unflatten(0, (len(DRAWS), -1))[0] for part in moons.labels)
    logits = logits_of(psi, x)
    before = cross_entropy(logits_of(theta, labelled), classes).detach()
    expected_loss, mean_term = torch.zeros((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    for labels in itertools.product((0, 1), repeat=4):
        y = one_hot(torch.tensor(labels), 2).to(x)
        loss = -(y * log_softmax(logits_of(theta, x), 1)).sum(1).mean()
        after = [p - 2.0 * g for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)]
        result = cross_entropy(logits_of(after, labelled), classes).detach()
        chance = (y * logits.softmax(1)).sum(1).prod()
        expected_loss = expected_loss + chance * result
        mean_term = mean_term + chance.detach() * hard_term(logits, y, (before - result)[None])
    exact = torch.autograd.grad(expected_loss, psi, retain_graph=True)
    for a, b in zip(torch.autograd.grad(mean_term, psi), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("control", ["none", "flipped"])
def test_hard_feedback_pays_labels_for_the_loss_they_take_away(control: str) -> None:
    """Oracle: h, old minus new, and the cross-entropy of the same labels, draw by draw."""
    settings = TINY.model_copy(update={"supervised_weight": 0.0, "feedback": "hard", "control": control})
    moons, student, teacher, points = problem(settings)
    thetas = [parameters_of(student.model, d) for d in range(len(DRAWS))]
    views, labels = (points.flatten(0, 1), None), moons.labels
    samplers, same = ([torch.Generator().manual_seed(d) for d in DRAWS] for _ in range(2))
    teacher_objective(student, teacher, views, labels, settings, samplers).backward()
    labelled, classes = (part.unflatten(0, (len(DRAWS), -1)) for part in labels)
    for d, theta in enumerate(thetas):
        psi = parameters_of(teacher, d)
        log_q = log_softmax(logits_of(psi, points[d]), 1)
        y = sampled(log_q.detach().exp(), same[d : d + 1])
        loss = -(y * log_softmax(logits_of(theta, points[d]), 1)).sum(1).mean()
        after = [p - settings.lr * g for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)]
        old, new = (float(cross_entropy(logits_of(p, labelled[d]), classes[d]).detach()) for p in (theta, after))
        h = old - new if control == "none" else new - old
        (expected,) = torch.autograd.grad(-h * (y * log_q).sum(), psi[:1])
        torch.testing.assert_close(len(DRAWS) * teacher.weights[0].grad[d], expected, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize(("method", "feedback"), [*((m, "soft") for m in EVERY), ("mpl", "hard")])
def test_a_draw_does_not_depend_on_the_draws_beside_it(method: MethodName, feedback: str) -> None:
    settings = TINY.model_copy(update={"feedback": feedback})
    together = train(method, settings, make_moons(DRAWS, settings, torch.float64))
    for place, draw in enumerate(DRAWS[:2]):
        alone = train(method, settings, make_moons((draw,), settings, torch.float64))
        for name in ("curve", "labelled_loss", "cosine_labelled", "cosine_true"):
            np.testing.assert_allclose(getattr(together, name)[:, place], getattr(alone, name)[:, 0], atol=1e-9)


def test_methods_differ_and_supervised_follows_the_six_labels() -> None:
    outcomes = {m: train(m, TINY, make_moons(DRAWS, TINY)) for m in EVERY}
    losses = {m: tuple(o.labelled_loss[-1].round(7)) for m, o in outcomes.items()}
    assert len(set(losses.values())) == len(EVERY)
    assert len({tuple(o.labelled_loss[0]) for o in outcomes.values()}) == 1  # the same start
    np.testing.assert_allclose(outcomes["supervised"].cosine_labelled, 1.0, atol=1e-6)
    np.testing.assert_allclose(outcomes["all_labels"].cosine_true, 1.0, atol=1e-6)
    assert outcomes["mpl"].teacher_accuracy is not None
    assert outcomes["supervised"].teacher_accuracy is None


def test_data_are_a_function_of_the_draw_and_lie_on_two_moons() -> None:
    settings = MoonsSettings(noise=0.0)
    one, other = make_moons((4,), settings), make_moons((9, 4), settings)
    assert torch.equal(one.points[0], other.points[1])
    assert torch.equal(one.labelled[0], other.labelled[1])
    assert not torch.equal(other.labelled[0], other.labelled[1])
    expected, clusters = sklearn_moons(2000, shuffle=False, noise=None)
    np.testing.assert_allclose(one.points[0].numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(one.clusters[0].numpy(), clusters)
    points, classes = other.labels
    assert points.shape == (12, 2)
    assert classes.tolist() == [0, 1] * 6
    noisy = make_moons((4,), MoonsSettings(noise=0.1)).points - one.points
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.05)


def test_the_start_is_uniform_and_the_student_is_not_its_teacher() -> None:
    settings = MoonsSettings(init=0.1, hidden=50)
    student, teacher = (Perceptrons((0, 1), settings, role) for role in ("student", "teacher"))
    for p in student.parameters():
        assert float(p.detach().abs().max()) <= 0.1
    assert float(student.weights[1].detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert not torch.equal(student.weights[0], teacher.weights[0])
    assert not torch.equal(student.weights[0][0], student.weights[0][1])


def test_cosines_are_per_draw() -> None:
    network = Perceptrons(DRAWS, TINY, "student", torch.float64)
    moons = make_moons(DRAWS, TINY, torch.float64)
    points, classes = moons.labels
    a = gradient(network, cross_entropy(network(points), classes))
    alone = parameters_of(network, 1)
    mine = slice(2 * 3, 4 * 3)
    cross_entropy(logits_of(alone, points[mine]), classes[mine]).backward()
    order = [0, 2, 4, 1, 3, 5]  # weights first, then biases
    expected = torch.cat([alone[i].grad.flatten() for i in order])
    torch.testing.assert_close(3 * a[1], expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(cosine(a, torch.stack([2 * a[0], -a[1], a[2]])), [1, -1, 1])


def test_discordant_draws_and_plateaus() -> None:
    assert discordant([True] * 6 + [False], [False] * 6 + [False]) == (6, 0, 2 * 0.5**6)
    assert discordant([True, False], [True, False]) == (0, 0, 1.0)
    losses = np.array([[0.7, 0.7], [0.5, 0.7], [0.4, 0.5]])
    result = CellResult([0.0] * 2, None, [0, 10, 30], losses, losses, losses, losses, np.zeros((2, 1, 1), np.float16))
    assert left_plateau(result) == "20"
    assert left_plateau(result, below=0.1) == "more than 30"


def test_smooth_lines_are_means_of_the_looks_around() -> None:
    np.testing.assert_allclose(smooth(np.arange(9.0))[2:-2], np.arange(9.0)[2:-2])
    np.testing.assert_allclose(smooth(np.ones(3)), 1.0)


def test_kept_results_come_back_and_damage_is_told(tmp_path: Path) -> None:
    cell = Cell("working", "mpl", TINY, (0, 1))
    result = RunCell()(cell, lambda steps: None)
    result.save(tmp_path / cell.file)
    again = CellResult.load(tmp_path / cell.file)
    for name, value in vars(result).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert Cell("working", "mpl", TINY, (0, 2)).file != cell.file
    (tmp_path / cell.file).write_bytes((tmp_path / cell.file).read_bytes()[:500])
    with pytest.raises(RunError, match="damaged"):
        CellResult.load(tmp_path / cell.file)


def test_the_table_tells_what_the_results_say() -> None:
    good, bad = [100.0, 98.0, 99.0], [100.0, 80.0, 97.9]

    def result(accuracy: list[float]) -> CellResult:
        return CellResult(accuracy, None, [0], *[np.full((1, 3), 0.7)] * 4, np.zeros((3, 1, 1), np.float16))

    row = Row("working", "settings", WORKING, ("supervised", "mpl"))
    cells = {"working/supervised": result(bad), "working/mpl": result(good)}
    text = MoonsReport(About("two-moons", "Two moons", "c"), [row], cells, range(3)).markdown()
    assert "| settings | 4,000 | – | **1**; 92.6 ± 11.0 | – | **3**; 99.0 ± 1.0 | – | – |" in text
    assert "**MPL − Supervised**: +6.37" in text
    assert "separates 2 draws that the other does not, and the other 0" in text


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    from stages.cli import main

    monkeypatch.setattr(sys, "argv", ["mpl", "reproduce", "two-moons", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_writes_its_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPL_RUN", raising=False)
    options = ("--variant", "working", "--seeds", 2, "--steps", 3, "--jobs", 1)
    assert call(monkeypatch, *options, "--dry-run") == 0
    assert not (tmp_path / "runs").exists()
    assert call(monkeypatch, *options, "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["result"]["success"]["working/mpl"] == 0
    run = tmp_path / "runs/two-moons"
    before = {path: path.stat().st_mtime_ns for path in run.glob("two-moons.*")}
    assert {path.suffix for path in before} == {".md", ".csv", ".json", ".png"}
    assert len((run / "two-moons.csv").read_text().splitlines()) == 1 + 2 * len(EVERY)
    kept = json.loads((run / "two-moons.json").read_text())
    assert kept["rows"]["working"]["settings"]["steps"] == 3
    assert call(monkeypatch, *options) == 0
    assert "already done" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert call(monkeypatch, *options[:-4], "--steps", 4) == 1  # other settings: not without --force
    assert "--force" in capsys.readouterr().err


def test_draws_begin_at_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: draw 4 of four from 3 on is draw 4 by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPL_RUN", raising=False)
    options = ("--variant", "working", "--steps", 3, "--jobs", 1)
    found = {}
    for seed, draws in ((3, 2), (4, 1)):
        run = tmp_path / f"run-{seed}"
        assert call(monkeypatch, *options, "--run", run, "--seed", seed, "--seeds", draws) == 0
        lines = (run / "two-moons.csv").read_text().splitlines()
        found[seed] = {tuple(line.split(",")[1:3]): line for line in lines[1:]}
    assert {draw for _, draw in found[3]} == {"3", "4"}
    assert {key: line.split(",")[3] for key, line in found[4].items()} == {
        key: line.split(",")[3] for key, line in found[3].items() if key[1] == "4"
    }
    text = (tmp_path / "run-3/two-moons.md").read_text()
    assert "--seeds 2 --seed 3" in text
    capsys.readouterr()


def test_the_study_holds_both_variants_and_the_controls() -> None:
    study = {row.name: row for row in rows(None, {})}
    assert study["paper"].settings == MoonsSettings()
    assert (study["paper"].settings.hidden, study["paper"].settings.lr, study["paper"].settings.init) == (8, 0.1, 0.1)
    assert study["working"].settings == WORKING
    assert study["flipped"].settings == WORKING.model_copy(update={"control": "flipped"})
    assert [row.name for row in rows("paper", {"steps": 7})] == ["paper"]
    assert all(row.settings.steps == 7 for row in rows(None, {"steps": 7}))
