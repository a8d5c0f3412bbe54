"""A small training with checkpoints, for any number of ranks: what the tests interrupt and go on with."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from pipeline.batches import Labelled, TargetBatch
from pipeline.checkpoints import Checkpoints
from pipeline.config import CalibratorSettings, FeedbackSettings
from pipeline.distributed.launch import joined
from pipeline.distributed.layouts import Layout, bare, lay_out, lay_out_average
from pipeline.distributed.placement import Placement
from pipeline.distributed.ranks import Ranks
from pipeline.optim import average_with_warmup
from pipeline.student import Student
from pipeline.teachers import Calibrator
from pipeline.training import train_step
from tests.distributed.checks import CLASSES, NETWORKS, whole
from tests.problems import optimizer_of

BATCH = 8


class Training:
    """Student, moving average and calibrator; the data of a step are a function of the step alone."""

    def __init__(self, ranks: Ranks, folder: Path, layout: Layout | None = None, identity: str = "this") -> None:
        layout = layout or Layout()
        torch.manual_seed(3)
        network = NETWORKS["group_norm"]().double().train()
        average = AveragedModel(network, multi_avg_fn=average_with_warmup(0.9), use_buffers=True)
        model = lay_out(network, layout, ranks)
        lay_out_average(average.module, layout, ranks)
        optimizer = optimizer_of("rmsprop_tf", bare(model), 1e-2)
        self.ranks, self.student, self.average = ranks, Student(model, optimizer, clip_norm=0.1, ranks=ranks), average
        engine = "exact" if layout.kind == "replicated" or ranks.world == 1 else "central"
        settings = CalibratorSettings(lr=1e-2, hidden=16)
        self.calibrator = Calibrator(CLASSES, settings, FeedbackSettings(engine=engine), Placement(ranks=ranks))
        self.calibrator.network.double()
        self.checkpoints = Checkpoints(folder, identity, ranks)
        self.networks = {
            "student": (model, optimizer),
            "average": (average, None),
            "teacher": (self.calibrator.network, self.calibrator.optimizer),
        }
        self.at, self.warnings = 0, list[str]()

    def restore(self) -> "Training":
        if (found := self.checkpoints.restore_networks(self.networks)) is not None:
            self.at, values, self.warnings = found
            assert values == {"step": self.at}
        return self

    def save(self) -> None:
        self.checkpoints.save_networks(self.at, self.networks, {"step": self.at})

    def run(self, steps: int, every: int = 0) -> "Training":
        while self.at < steps:
            self.step()
            if every and self.at % every == 0:
                self.save()
        return self

    def step(self) -> None:
        draws = torch.Generator().manual_seed(self.at)
        images, labelled = torch.randn(2, BATCH, 3, 32, 32, dtype=torch.float64, generator=draws)
        q = torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=draws).softmax(1)
        labels = torch.randint(CLASSES, (BATCH,), generator=draws)
        n = self.ranks.share(BATCH, "batch")
        rows = slice(self.ranks.rank * n, (self.ranks.rank + 1) * n)
        batch = TargetBatch(images[rows], q[rows], torch.ones(n, dtype=torch.bool))
        own = F.one_hot(labels[rows], CLASSES).double()
        train_step(self.student, self.calibrator, batch, Labelled(labelled[rows], labels[rows], own), "gradient")
        self.average.update_parameters(bare(self.student.model))
        self.at += 1

    def tensors(self) -> dict[str, Tensor]:
        """Whole weights of everything, and the optimisers' averages."""
        found: dict[str, Any] = {}
        for label, (model, optimizer) in self.networks.items():
            network = bare(model)
            found |= {f"{label} {name}": t for name, t in whole(network).items()}
            if optimizer is not None:
                for name, p in network.named_parameters():
                    for key, value in optimizer.state[p].items():
                        full = value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
                        found[f"{label} {name} {key}"] = full.clone()
        return found


def main(folder: Path, steps: int, dies: int) -> None:
    """Under torchrun: the last rank of the first attempt kills itself, as kill -9 does, in step `dies`."""
    died = folder / "died"
    with joined(torch.device("cpu"), timeout=600) as ranks, ranks.watched("training"):
        ranks.check_same("the recipe", f"{steps} {dies}")
        training = Training(ranks, folder / "checkpoints").restore()
        started_at = training.at
        while training.at < steps:
            if ranks.rank == ranks.world - 1 and training.at == dies and not died.exists():
                died.touch()
                (folder / "launch").write_text(ranks.launch)
                os.kill(os.getpid(), signal.SIGKILL)
            training.step()
            if training.at % 2 == 0:
                training.save()
        found = training.tensors()
        if ranks.first:
            torch.save({"tensors": found, "started_at": started_at, "launch": ranks.launch}, folder / "result.pt")
        ranks.barrier("the end")  # as the stages do: a rank that leaves early breaks the others' connections


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
