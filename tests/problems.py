"""Small problems for the tests of the meta-gradient."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.optim import RMSpropTF
from torch import Tensor, nn

from pipeline.student import Student

CLASSES, BATCH, LABELLED = 5, 4, 3
RULES = ("sgd", "momentum", "nesterov", "rmsprop", "rmsprop_tf", "adam", "adamw")
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": partial(timm.create_model, "resnet10t"),
    "efficientnet": lambda **arguments: small_efficientnet(**arguments),
    "vit": partial(timm.create_model, "test_vit", img_size=32, patch_size=8),
}


def small_efficientnet(**arguments: Any) -> nn.Module:
    """EfficientNet-B0's kinds of block, with the shortcuts (and so the drop path) that timm's test net lacks."""
    blocks = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e4_c16_se0.25"], ["ir_r2_k5_s1_e4_c16_se0.25"]]
    return EfficientNet(decode_arch_def(blocks), num_features=64, stem_size=8, act_layer=nn.SiLU, **arguments)


@dataclass
class Problem:
    """A student about to take a step, its batch and labelled images."""

    student: Student
    images: Tensor
    targets: Tensor
    labelled: Tensor
    labels: Tensor
    seed: int = 11

    def learn(self, **kwargs: Any) -> Any:
        torch.manual_seed(self.seed)
        return self.student.learn(self.images, self.targets, **kwargs)

    def oracle_arguments(self) -> tuple[Any, ...]:
        model, optimizer = self.student.model, self.student.optimizer
        return model, optimizer, self.images, self.targets, self.labelled, self.labels

    def oracle(self, **kwargs: Any) -> Tensor:
        from tests.oracles.double_backward import target_gradient

        return target_gradient(*self.oracle_arguments(), clip_norm=self.student.clip_norm, seed=self.seed, **kwargs)


def optimizer_of(rule: str, model: nn.Module, weight_decay: float, lr: float = 0.05) -> torch.optim.Optimizer:
    p = list(model.parameters())
    match rule:
        case "sgd":
            return torch.optim.SGD(p, lr=lr, weight_decay=weight_decay)
        case "momentum":
            return torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=weight_decay)
        case "nesterov":
            return torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
        case "rmsprop":
            return torch.optim.RMSprop(p, lr=lr / 10, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=weight_decay)
        case "rmsprop_tf":
            return RMSpropTF(p, lr=lr, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=weight_decay)
        case "adam":
            return torch.optim.Adam(p, lr=lr / 10, eps=1e-6, weight_decay=weight_decay)
        case _:
            return torch.optim.AdamW(p, lr=lr / 10, eps=1e-6, weight_decay=weight_decay)


def make_problem(
    network: str = "resnet",
    rule: str = "rmsprop_tf",
    *,
    warm: bool = True,
    clip: bool = False,
    decay: bool = False,
    dropout: bool = False,
    drop_path: bool = False,
    dtype: torch.dtype = torch.float64,
    batch: int = BATCH,
) -> Problem:
    """A problem; `warm` takes two steps first, so that averages and momentum are not fresh."""
    torch.manual_seed(3)
    model = NETWORKS[network](
        num_classes=CLASSES, drop_rate=0.3 if dropout else 0.0, drop_path_rate=0.3 if drop_path else 0.0
    )
    model = copy.deepcopy(model).to(dtype).train()
    images = torch.randn(3, batch, 3, 32, 32, dtype=dtype)
    targets = torch.randn(3, batch, CLASSES, dtype=dtype).mul(2).softmax(2)
    count = LABELLED if batch == BATCH else batch
    labelled, labels = torch.randn(count, 3, 32, 32, dtype=dtype), torch.arange(count) % CLASSES
    student = Student(model, optimizer_of(rule, model, 1e-2 if decay else 0.0), clip_norm=0.5 if clip else None)
    if warm:
        for step in range(2):
            student.learn(images[step], targets[step], replay=False)
    return Problem(student, images[2], targets[2], labelled, labels)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def all_pairs(factors: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Few cases in which every pair of values of every two factors occurs; greedy, deterministic."""
    names = list(factors)
    left = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    product = [dict(zip(names, values, strict=True)) for values in itertools.product(*factors.values())]
    while left:
        covered, case = max(
            ((set(itertools.combinations(case.items(), 2)) & left, case) for case in product),
            key=lambda item: len(item[0]),
        )
        left -= covered
        yield case
