"""One training of three steps, by any number of ranks in any layout: what the tests compare."""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from pipeline.batches import Labelled, TargetBatch, ViewBatch
from pipeline.config import CalibratorSettings, FeedbackSettings, MplFeedbackSettings, ScheduleSettings
from pipeline.distributed.layouts import Layout, bare, lay_out
from pipeline.distributed.placement import Placement
from pipeline.distributed.ranks import Ranks
from pipeline.methods import Views, parse_method
from pipeline.optim import learning_rate
from pipeline.student import Student, StudentStep
from pipeline.teacher_network import TeacherNetwork, TeacherRule
from pipeline.teachers import Calibrator
from pipeline.training import train_step
from tests.problems import optimizer_of

CLASSES, STEPS = 5, 3
REPLICATED = Layout()


class Residual(nn.Module):
    """A block with GroupNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.norm(self.convolution(x)))


def group_norm_network() -> nn.Module:
    blocks = nn.Sequential(Residual(6), Residual(6))  # 6 and 5 rows: shards of unequal size
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    )


class BatchNorms(nn.Module):
    """All kinds of batch normalisation that are synchronised: torch's two, and timm's with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6)
        self.second, self.act = nn.Conv2d(6, 6, 3), BatchNormAct2d(6, act_layer=nn.SiLU)
        self.flat, self.head = nn.BatchNorm1d(6, affine=False), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(F.silu(self.norm(self.first(x)))))
        return self.head(self.flat(x.mean((2, 3))))


NETWORKS = {
    "vit": lambda: timm.create_model("test_vit", img_size=32, patch_size=16, depth=2, num_classes=CLASSES),
    "group_norm": group_norm_network,
    "batch_norm": BatchNorms,
}


@dataclass(frozen=True)
class Case:
    """How to train. `method`: reduced (a calibrator), soft or hard (a teacher network)."""

    layout: Layout = REPLICATED
    method: Literal["reduced", "soft", "hard"] = "reduced"
    network: str = "group_norm"
    rule: str = "rmsprop_tf"
    clip: bool = True
    engine: Any = "exact"
    micro_batches: int = 1
    batch: int = 8
    foreign: bool = False  # sharded by a person's own hand, with torch's defaults
    weighted: bool = False
    baseline: float = 0.0

    @property
    def alone(self) -> "Case":
        """The same training by a single process, without anything that could go wrong between several."""
        return replace(self, layout=Layout(), micro_batches=1, foreign=False)


def train(ranks: Ranks, case: Case) -> dict[str, Tensor]:
    """All weights after three steps, gathered; losses; dR/dq of the global batch."""
    torch.manual_seed(3)
    network = NETWORKS[case.network]().double().train()
    model = foreign_sharding(network) if case.foreign else lay_out(network, case.layout, ranks)
    student = Student(
        model,
        optimizer_of(case.rule, bare(model), 1e-2),
        clip_norm=0.1 if case.clip else None,
        ranks=ranks,
        micro_batches=case.micro_batches,
    )
    learner = Reduced(case, ranks) if case.method == "reduced" else Full(case, ranks)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        draws = torch.Generator().manual_seed(step)
        images = torch.randn(case.batch, 3, 32, 32, dtype=torch.float64, generator=draws)
        q = torch.randn(case.batch, CLASSES, dtype=torch.float64, generator=draws).mul(2).softmax(1)
        labelled = torch.randn(case.batch, 3, 32, 32, dtype=torch.float64, generator=draws)
        labels = torch.randint(CLASSES, (case.batch,), generator=draws)
        weight = torch.rand(case.batch, dtype=torch.float64, generator=draws) if case.weighted else None
        n = ranks.share(case.batch, "batch")
        rows = slice(ranks.rank * n, (ranks.rank + 1) * n)
        mine = None if weight is None else weight[rows]
        torch.manual_seed(step)
        taken = learner.step(student, images[rows], q[rows], labelled[rows], labels[rows], mine)
        found |= {f"{name} {step}": value for name, value in taken.items()}
    found |= {f"student {name}": t for name, t in whole(student.module).items()}
    return found | {f"teacher {name}": t for name, t in whole(bare(learner.network)).items()}


class Reduced:
    """Reduced MPL: the project's own calibrator."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        torch.manual_seed(4)
        settings = CalibratorSettings(lr=1e-2, supervised_weight=0.5, hidden=16)
        options = FeedbackSettings(engine=case.engine)
        self.calibrator = Calibrator(CLASSES, settings, options, Placement(ranks=ranks))
        self.network = self.calibrator.network.double()

    def step(self, student: Student, x: Tensor, q: Tensor, xl: Tensor, yl: Tensor, w: Any) -> Any:
        proposal = self.calibrator.propose(TargetBatch(x, q, torch.ones(len(q), dtype=torch.bool)))
        taken = student.learn(x, proposal.targets.detach(), w, probe=(xl, yl))
        own = 0.9 * F.one_hot(yl, CLASSES).double() + 0.02
        metrics = self.calibrator.adapt(proposal, taken, Labelled(xl, yl, own))
        return losses(taken) | {"R": metrics["feedback_loss"]}


class Full:
    """Full MPL: the project's own teacher network, in the student's layout."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        torch.manual_seed(5)
        self.ranks, self.at = ranks, 0
        self.network = lay_out(NETWORKS[case.network]().double().train(), case.layout, ranks)
        assert case.method != "reduced"
        rule = TeacherRule(
            parse_method("uda"),
            case.method,
            MplFeedbackSettings(scale="per_image", engine=case.engine, baseline=case.baseline),
            learning_rate=lambda step: learning_rate(ScheduleSettings(), 0.05, step, STEPS),
            clip_norm=0.1 if case.clip else None,
        )
        placement = Placement(ranks=ranks, micro_batches=case.micro_batches)
        optimizer = optimizer_of("adamw", bare(self.network), 1e-2)
        self.teacher = TeacherNetwork(self.network, optimizer, rule, placement)

    def step(self, student: Student, x: Tensor, q: Tensor, xl: Tensor, yl: Tensor, w: Any) -> Any:
        views = Views(self.at, xl, F.one_hot(yl, CLASSES).double(), None, torch.zeros(len(xl)), x, x.flip(3))
        batch = ViewBatch(x, views, weight=w)
        metrics = train_step(student, self.teacher, batch, Labelled(xl, yl), self.teacher.wish(self.at))
        self.at += 1
        return metrics | {name: self.ranks.mean(metrics[name]) for name in ("teacher_loss", "teacher_pool_share")}


def losses(step: StudentStep) -> dict[str, Tensor]:
    found = {"loss": step.loss, "norm": step.gradient_norm}
    if step.labelled_losses is not None:
        found |= {"R before": step.labelled_losses[0], "R after": step.labelled_losses[1]}
    return found


def foreign_sharding(network: nn.Module) -> nn.Module:
    """FSDP2 with torch's defaults, the outermost parameters left gathered after a forward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in network[1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def whole(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: copy.deepcopy((t.full_tensor() if hasattr(t, "full_tensor") else t).detach())
        for name, t in network.state_dict().items()
    }


def train_all(ranks: Ranks, cases: dict[str, Case]) -> dict[str, dict[str, Tensor]]:
    return {name: train(ranks, case) for name, case in cases.items()}
