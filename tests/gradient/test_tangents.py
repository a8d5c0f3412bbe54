"""The fused forward-mode rules against torch's own, in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.gradient import tangents
from pipeline.gradient.tangents import RULES, FusedTangents
from tests.problems import make_problem, relative_error

Function = Callable[..., Tensor]


def randn(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def forward(function: Function, values: list[Tensor], moving: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Value and derivative in the arguments `moving`, along the same random direction whoever differentiates."""
    torch.manual_seed(1)
    with torch.no_grad(), dual_level(), sdpa_kernel(SDPBackend.MATH):
        arguments = [
            make_dual(v.clone(), torch.randn_like(v)) if i in moving else v.clone() for i, v in enumerate(values)
        ]
        found = unpack_dual(function(*arguments))
        return found.primal, found.tangent


def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3)


def eval_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    statistics = torch.linspace(0, 1, 4, dtype=torch.float64), torch.linspace(1, 2, 4, dtype=torch.float64)
    return F.batch_norm(x, *statistics, gamma, beta, training=False)


CASES: dict[str, tuple[Function, list[Tensor]]] = {
    "batch_norm": (norm, [randn(5, 4, 3, 3), randn(4), randn(4)]),
    "batch_norm channels last": (norm, [randn(5, 4, 3, 3, channels_last=True), randn(4), randn(4)]),
    "batch_norm of rows": (norm, [randn(5, 4), randn(4), randn(4)]),
    "batch_norm with a scale of zero": (norm, [randn(5, 4, 3, 3), torch.zeros(4).double(), randn(4)]),
    "batch_norm in eval mode": (eval_norm, [randn(5, 4, 3, 3), randn(4), randn(4)]),
    "layer_norm": (lambda x, g, b: F.layer_norm(x, (6,), g, b), [randn(2, 3, 6), randn(6), randn(6)]),
    "layer_norm of two": (lambda x, g, b: F.layer_norm(x, (3, 6), g, b), [randn(2, 3, 6), randn(3, 6), randn(3, 6)]),
    "linear": (F.linear, [randn(2, 3, 6), randn(4, 6), randn(4)]),
    "linear of rows": (F.linear, [randn(3, 6), randn(4, 6), randn(4)]),
    "linear of transposed": (lambda x, w, b: F.linear(x.mT, w, b), [randn(2, 6, 3), randn(4, 6), randn(4)]),
    "attention": (F.scaled_dot_product_attention, [randn(2, 3, 5, 4), randn(2, 3, 7, 4), randn(2, 3, 7, 6)]),
    "attention scaled": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        [randn(2, 3, 5, 4), randn(2, 3, 5, 4), randn(2, 3, 5, 4)],
    ),
    "attention causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [randn(2, 3, 5, 4), randn(2, 3, 5, 4), randn(2, 3, 5, 4)],
    ),
    "silu in place": (lambda x, y, z: F.silu(x * y, inplace=True) + z, [randn(3, 6), randn(3, 6), randn(6)]),
    "silu": (lambda x, y, z: F.silu(x * y) + z, [randn(3, 6), randn(3, 6), randn(6)]),
    "relu in place": (lambda x, y, z: F.relu(x * y, inplace=True) + z, [randn(3, 6), randn(3, 6), randn(6)]),
}


@pytest.mark.parametrize("moving", [(0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rules_equal_torchs_own(case: str, moving: tuple[int, ...]) -> None:
    function, values = CASES[case]
    expected, slope = forward(function, values, moving)
    with FusedTangents():
        found, fused = forward(function, values, moving)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert slope is not None
    torch.testing.assert_close(fused, slope, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_normalisation_without_parameters(kind: str, absent: str) -> None:
    def function(x: Tensor, parameter: Tensor) -> Tensor:
        given = {} if absent == "both" else {"bias" if absent == "weight" else "weight": parameter}
        if kind == "batch_norm":
            return F.batch_norm(x, None, None, training=True, **given)
        return F.layer_norm(x, (4,), **given)

    values = [randn(5, 4), randn(4)]
    _, slope = forward(function, values, (0, 1))
    with FusedTangents():
        _, fused = forward(function, values, (0, 1))
    torch.testing.assert_close(fused, slope, rtol=1e-11, atol=1e-11)


VIEWS: dict[str, Function] = {
    "sum": lambda a: a + 1.0,
    "copy": lambda a: a.clone(),
    "view": lambda a: a.view(3),
    "part": lambda a: a[:2],
    "same": lambda a: a.contiguous(),
    "dropout of nothing": lambda a: F.dropout(a, 0.0),
    "concatenated": lambda a: torch.cat([a]),
}


@pytest.mark.parametrize("activation", [F.silu, F.relu])
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_changes_what_torch_would_change(activation: Any, view: str) -> None:
    """Values and tangents of the result and of the tensor it may share memory with."""

    def run() -> list[Tensor]:
        with torch.no_grad(), dual_level():
            base = make_dual(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])) * 1.0
            changed = activation(VIEWS[view](base), inplace=True)
            return [t.clone() for t in (*unpack_dual(base), *unpack_dual(changed))]

    expected = run()
    with FusedTangents():
        found = run()
    torch.testing.assert_close(found, expected)


def test_batch_norm_leaves_running_statistics() -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    with torch.no_grad(), dual_level(), FusedTangents():
        F.batch_norm(make_dual(torch.randn(5, 4), torch.randn(5, 4)), mean, var, training=True)
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(var, torch.ones(4))


@pytest.mark.parametrize(
    ("network", "used"),
    [
        ("resnet", {"batch_norm", "relu"}),
        ("efficientnet", {"batch_norm", "silu"}),
        ("vit", {"layer_norm", "linear", "scaled_dot_product_attention"}),
    ],
)
def test_the_rules_act_in_the_student_and_change_nothing(network: str, used: set[str], monkeypatch) -> None:
    called = set()
    for function, rule in list(RULES.items()):

        def counted(*args: Any, function: Any = function, rule: Any = rule, **kwargs: Any) -> Any:
            result = rule(*args, **kwargs)
            if result is not None:
                called.add(function.__name__)
            return result

        monkeypatch.setitem(tangents.RULES, function, counted)
    problem = make_problem(network, clip=True, dropout=True, drop_path=True)
    step = problem.learn()
    fused = step.target_gradient(problem.labelled, problem.labels)
    assert used <= called
    monkeypatch.setattr("pipeline.gradient.derivative.FusedTangents", nullcontext)
    assert relative_error(fused, step.target_gradient(problem.labelled, problem.labels)) < 1e-12
