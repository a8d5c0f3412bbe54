"""The meta-gradient against autograd through the whole step, in float64."""

import copy

import pytest
import torch
from timm.optim import RMSpropTF
from torch import nn

from pipeline.config import CalibratorSettings
from pipeline.distributed.blocks import blocks_of, checkpoint_block
from pipeline.errors import FeedbackError, NonFiniteError
from pipeline.student import Student
from pipeline.teachers import CalibratorNetwork
from tests.oracles.double_backward import step_and_loss, teacher_gradient
from tests.problems import NETWORKS, RULES, all_pairs, make_problem, optimizer_of, relative_error

ONOFF = (False, True)
CASES = list(
    all_pairs(
        {
            "rule": RULES,
            "network": tuple(NETWORKS),
            "warm": ONOFF,
            "clip": ONOFF,
            "decay": ONOFF,
            "dropout": ONOFF,
            "drop_path": ONOFF,
        }
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_target_gradient_equals_double_backward(case: dict) -> None:
    """Over all pairs of rule, network, state, clipping, weight decay, dropout and drop path."""
    problem = make_problem(**case)
    exact = problem.oracle()
    found = problem.learn().target_gradient(problem.labelled, problem.labels)
    assert relative_error(found, exact) < (1e-8 if case["network"] == "efficientnet" else 1e-9)


def test_the_cases_cover_every_rule_on_every_network() -> None:
    assert {(c["rule"], c["network"]) for c in CASES} == {(r, n) for r in RULES for n in NETWORKS}
    assert {(c["rule"], c["warm"]) for c in CASES} == {(r, w) for r in RULES for w in ONOFF}


@pytest.mark.parametrize("rule", RULES)
def test_the_oracle_takes_the_step_that_the_optimiser_takes(rule: str) -> None:
    """Otherwise the oracle would be an oracle of another rule."""
    problem = make_problem(rule=rule, clip=True, decay=True)
    _, after = step_and_loss(*problem.oracle_arguments(), clip_norm=0.5, seed=problem.seed)
    problem.learn()
    for name, p in problem.student.model.named_parameters():
        torch.testing.assert_close(p.detach(), after[name].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["adam_decoupled", "rmsprop_tf_decoupled", "frozen"])
def test_variants_of_the_rules(rule: str) -> None:
    """Decoupled decay by option leaves D alone; a frozen parameter takes no part."""
    problem = make_problem(rule=rule.removesuffix("_decoupled"), decay=True)
    group = problem.student.optimizer.param_groups[0]
    if rule == "frozen":
        problem.student.model.conv1.requires_grad_(False)
    group["decoupled_weight_decay" if rule.startswith("adam") else "decoupled_decay"] = rule != "frozen"
    exact = problem.oracle()
    found = problem.learn().target_gradient(problem.labelled, problem.labels)
    assert relative_error(found, exact) < 1e-9


def test_one_labelled_image() -> None:
    """Autograd then gives the class token and the position embedding gradients in the same memory."""
    problem = make_problem("vit")
    problem.labelled, problem.labels = problem.labelled[:1], problem.labels[:1]
    exact = problem.oracle()
    found = problem.learn().target_gradient(problem.labelled, problem.labels)
    assert relative_error(found, exact) < 1e-9


def test_weights_per_row() -> None:
    problem = make_problem()
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    exact = problem.oracle(weight=weight)
    found = problem.learn(weight=weight).target_gradient(problem.labelled, problem.labels)
    assert relative_error(found, exact) < 1e-9


@pytest.mark.parametrize("network", NETWORKS)
def test_finite_differences_in_float32(network: str) -> None:
    """Against the exact gradient of the same float32 step; smooth networks, so that kinks do not count.

    Sixteen images: batch statistics over four are too ill-conditioned for any difference quotient.
    """
    problem = make_problem(network, "rmsprop_tf", dtype=torch.float32, batch=16)
    for module in problem.student.model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    step = problem.learn()
    exact = step.target_gradient(problem.labelled, problem.labels)
    central = step.target_gradient(problem.labelled, problem.labels, engine="central")
    one_sided = step.target_gradient(problem.labelled, problem.labels, engine="one_sided")
    assert relative_error(central, exact) < 1e-2
    assert relative_error(one_sided, exact) < 5e-2


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("residual", False), ("residual", True), ("perceptron", False), ("perceptron", True), ("scaling", False)],
)
@pytest.mark.parametrize(("inputs", "embedding"), [(None, 0), (9, 0), (9, 4), (None, 4)])
def test_gradient_in_the_calibrator_equals_equation_2(
    kind: str, inputs: int | None, embedding: int, weights: bool
) -> None:
    """End to end: through q_Ψ, and a weight of each image, and the student's whole update; also of a teacher with nine
    classes of its own, and of images with embeddings."""
    problem = make_problem(rule="rmsprop", clip=True, dropout=True)
    torch.manual_seed(5)
    settings = CalibratorSettings(kind=kind, hidden=16, image_weights=weights)
    calibrator = CalibratorNetwork(5, settings, inputs, embedding, ratios=inputs is not None).double()
    rows, stored = len(problem.targets), None
    if inputs is not None or embedding:
        seen = problem.targets if inputs is None else torch.rand(rows, inputs, dtype=torch.float64).softmax(1)
        stored = torch.cat([seen, torch.randn(rows, embedding, dtype=torch.float64)], dim=1)
    for p in list(calibrator.parameters())[-2:]:
        nn.init.normal_(p if p.ndim else p.view(1), std=0.1)  # off its start, where most gradients are zero
    q_large, parameters = problem.targets, list(calibrator.parameters())
    model, optimizer, images, _, labelled, labels = problem.oracle_arguments()
    literal = teacher_gradient(
        lambda: calibrator(q_large, stored), parameters, model, optimizer, images, labelled, labels,
        clip_norm=0.5, seed=problem.seed,
    )  # fmt: skip
    targets = calibrator(q_large, stored)
    problem.targets = targets.detach()
    step = problem.learn()
    (targets * step.target_gradient(labelled, labels)).sum().backward()
    for p, expected in zip(parameters, literal, strict=True):
        assert p.grad is not None
        assert relative_error(p.grad, expected) < 1e-9


@pytest.mark.parametrize("engine", ["exact", "central"])
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_micro_batches_are_the_whole_batch(parts: int, engine: str) -> None:
    """Equal and unequal parts, and more parts than rows; a network without batch statistics."""
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    whole, problem = (make_problem("vit", clip=True, decay=True) for _ in range(2))
    probe = (problem.labelled, problem.labels)
    exact = problem.oracle(weight=weight)
    problem.student.micro_batches = parts
    step = problem.learn(weight=weight, probe=probe)
    found, labelled_loss = step.feedback(*probe, engine=engine)
    assert relative_error(found, exact) < (1e-9 if engine == "exact" else 1e-5)
    at_once = whole.learn(weight=weight, probe=probe)
    after = dict(whole.student.model.named_parameters())
    for name, p in problem.student.model.named_parameters():
        torch.testing.assert_close(p, after[name], rtol=1e-9, atol=1e-12)
    for a, b in ((step.loss, at_once.loss), *zip(step.labelled_losses, at_once.labelled_losses, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(labelled_loss, step.labelled_losses[1], rtol=1e-12, atol=0)


def test_batch_statistics_are_those_of_a_micro_batch() -> None:
    problem = make_problem("efficientnet")
    problem.student.micro_batches = 2
    model = problem.student.model
    with torch.no_grad():
        parts = torch.cat([model(problem.images[:2]), model(problem.images[2:])]).log_softmax(1)
    step = problem.learn()
    torch.testing.assert_close(step.log_probabilities, parts, rtol=1e-12, atol=0)
    step.target_gradient(problem.labelled, problem.labels)  # the guard accepts the replay


def test_the_labelled_losses_before_and_after() -> None:
    """R as `target_gradient` has it, at both ends of the step; running statistics and masks untouched."""
    problem, plain = (make_problem("efficientnet", dropout=True, drop_path=True) for _ in range(2))
    probe = (problem.labelled, problem.labels)
    step = problem.learn(probe=probe)
    before, after = step.labelled_losses
    torch.testing.assert_close(after, step.feedback(*probe).labelled_loss, rtol=1e-12, atol=0)
    plain.student.optimizer.param_groups[0]["lr"] = 0.0
    plain.student.optimizer.param_groups[0]["momentum"] = 0.0
    still = plain.learn().feedback(*probe)  # at the weights before the step
    torch.testing.assert_close(before, still.labelled_loss, rtol=1e-9, atol=0)
    assert float(before) != float(after)
    for a, b in zip(problem.student.model.buffers(), plain.student.model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert problem.learn(replay=False).labelled_losses is None


@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_that_are_run_again_change_nothing(network: str) -> None:
    """Activation checkpointing: the exact gradient, and running statistics that move once."""
    problem, plain = (make_problem(network, clip=True, dropout=True, drop_path=True) for _ in range(2))
    blocks = blocks_of(problem.student.model)
    assert [type(b).__name__ for b in blocks] == {
        "vit": ["Block"] * 6,
        "resnet": ["BasicBlock"] * 4,
        "efficientnet": ["DepthwiseSeparableConv", *["InvertedResidual"] * 4],
    }[network]
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    exact = problem.oracle()
    for block in blocks:
        checkpoint_block(block)
        next(block.children()).register_forward_hook(count)
        checkpoint_block(block)  # once is enough
    assert blocks_of(copy.deepcopy(problem.student.model))[0].forward.args[0].__self__ is not blocks[0]
    step = problem.learn()
    assert runs == 4 * len(blocks)  # forward, again in the backward pass, and twice to see whether it is the same
    found = step.target_gradient(problem.labelled, problem.labels)
    assert relative_error(found, exact) < (1e-8 if network == "efficientnet" else 1e-9)
    plain.learn()
    for a, b in zip(problem.student.model.buffers(), plain.student.model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_step_without_replay_gives_no_feedback() -> None:
    problem = make_problem(rule="sgd")
    with pytest.raises(FeedbackError, match="replay=True"):
        problem.learn(replay=False).target_gradient(problem.labelled, problem.labels)


def test_a_stale_step_gives_no_feedback() -> None:
    problem = make_problem(rule="sgd")
    step = problem.learn()
    problem.learn(replay=False)
    with pytest.raises(FeedbackError, match="1 more step"):
        step.target_gradient(problem.labelled, problem.labels)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening"),
        (lambda p: torch.optim.RMSprop(p, centered=True), "centered"),
        (lambda p: RMSpropTF(p, centered=True), "centered"),
        (lambda p: RMSpropTF(p, momentum=0.9, caution=True), "caution"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.Adadelta(p), "Adadelta"),
    ],
)
def test_rules_without_a_derivative_are_refused_by_name(make, option: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    student = Student(model, make(list(model.parameters())))
    images, targets = torch.randn(2, 3, 2, 2), torch.full((2, 3), 1 / 3)
    with pytest.raises(FeedbackError, match=option):
        student.learn(images, targets)
    student.learn(images, targets, replay=False)  # without feedback any optimiser will do


@pytest.mark.parametrize("rule", ["rmsprop_tf", "adamw"])
def test_a_non_finite_loss_stops_before_the_update(rule: str) -> None:
    problem = make_problem(rule=rule)
    before = {k: v.clone() for k, v in problem.student.model.named_parameters()}
    state = [v.clone() for s in problem.student.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    problem.images[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="step 3"):
        problem.learn()
    for name, p in problem.student.model.named_parameters():
        assert torch.equal(p, before[name])
    after = [v for s in problem.student.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_of_zero_gives_a_finite_derivative(rule: str) -> None:
    """Fresh averages and an exactly zero gradient: s = 0 in every denominator."""
    from pipeline.gradient.update_rules import update_derivative

    model = nn.Linear(2, 2).double()
    optimizer = optimizer_of(rule, model, 0.0)
    group, p = optimizer.param_groups[0], model.weight
    found = torch.as_tensor(update_derivative(optimizer, group, p, torch.zeros_like(p)))
    lr, eps = group["lr"], group.get("eps", 1.0)
    expected = {
        "sgd": -lr,
        "momentum": -lr,
        "nesterov": -lr * 1.9,
        "rmsprop": -lr / eps,
        "rmsprop_tf": -lr / (0.9 + eps) ** 0.5,
        "adam": -lr / eps,
        "adamw": -lr / eps,
    }[rule]
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("network", "cosine"), [("vit", 0.999), ("efficientnet", 0.95)])
def test_mixed_precision_keeps_the_direction(network: str, cosine: float) -> None:
    """bf16 autocast on the CPU against float32."""
    exact = make_problem(network, dtype=torch.float32, batch=16)
    mixed = make_problem(network, dtype=torch.float32, batch=16)
    mixed.student.autocast = torch.bfloat16
    a = exact.learn().target_gradient(exact.labelled, exact.labels)
    b = mixed.learn().target_gradient(mixed.labelled, mixed.labels)
    assert float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > cosine
    with pytest.raises(FeedbackError, match="mixed precision"):
        mixed.learn().target_gradient(mixed.labelled, mixed.labels, engine="central")
