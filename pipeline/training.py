"""The one training loop: batches in, metrics and checkpoints out, for every method and every stage."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.checkpoints import CHECKPOINTS, Checkpoints
from pipeline.config import TrainSettings
from pipeline.distributed import ALONE, Ranks
from pipeline.distributed.layouts import Layout, bare, full_state, lay_out, lay_out_average
from pipeline.errors import NonFiniteError
from pipeline.named_tensors import Networks
from pipeline.optim import average_with_warmup, build_optimizer, learning_rate, set_learning_rate
from pipeline.seeds import derive_seed
from pipeline.storage.metrics import MetricsLog
from pipeline.student import Student
from pipeline.teachers import Batch, Labelled, Metrics, Teacher, Wish


class Observer(Protocol):
    """Who watches a long piece of work; the library itself never prints."""

    def note(self, text: str) -> None:
        """Something that a person should know."""
        ...

    def progress(self, done: int, total: int, values: dict[str, float]) -> None:
        """`done` of `total` units; `values` is empty between log intervals."""
        ...

    def stop_requested(self) -> bool:
        """Whether to save and stop at the next opportunity."""
        ...


class Batches(Protocol):
    """What a training sees, as a pure function of the step."""

    def batch(self, step: int) -> Batch:
        """The student's batch."""
        ...

    def feedback(self, step: int) -> Labelled:
        """Labelled images for the teacher's turn."""
        ...


class Interrupted(KeyboardInterrupt):
    """Stopped on request after a checkpoint was saved."""


@dataclass
class Progress:
    """Where a training stands, beside the weights."""

    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)  # of the metrics since the last log row
    counts: dict[str, int] = field(default_factory=dict)


def train_step(
    student: Student, teacher: Teacher, batch: Batch, labelled: Labelled | None, wish: Wish, *, waits: bool = False
) -> Metrics:
    """One step of any method: the student learns from the teacher, then the teacher from the student.

    `labelled` goes with a `wish` of the teacher; a student that `waits` does not learn yet.
    """
    targets = teacher(batch)  # (B, C), differentiable in the teacher
    if waits:
        return teacher.adapt(None, targets, batch, None)
    probe = (labelled.images, labelled.labels) if labelled is not None and wish == "losses" else None
    step = student.learn(batch.images, targets.detach(), batch.weight, replay=wish == "gradient", probe=probe)
    metrics = {"loss": step.loss, "gradient_norm": step.gradient_norm}
    return metrics | teacher.adapt(step, targets, batch, labelled)


class Training:
    """A student, its teacher and its moving average, from the first step or a checkpoint to the last.

    Args:
        model: the student's network, on its device.
        teacher: gives targets and may adapt.
        data: batches as a pure function of the step.
        settings: steps, optimiser, schedule, intervals.
        folder: gets metrics.csv, tensorboard/ and checkpoints/.
        identity: fingerprint of what is trained, kept with the checkpoints.
        seed: of dropout and drop path.
        observer: told of progress.
        validate: figures of a network for the log (validation_top1 …); never for a choice.
        autocast: dtype of mixed precision, or None.
        ranks: the processes that train together; `data` gives each its share of a batch.
        layout: how the network lies on them.
        micro_batches: parts in which a share is taken.
        wait: steps that the teacher learns alone, before the student's first.
        watch: told how many steps are done, at the start and after each.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        data: Batches,
        settings: TrainSettings,
        *,
        folder: Path,
        identity: str,
        seed: int,
        observer: Observer,
        validate: Callable[[nn.Module], dict[str, float]],
        autocast: torch.dtype | None = None,
        wait: int = 0,
        watch: Callable[[int], None] = lambda done: None,
        ranks: Ranks = ALONE,
        layout: Layout | None = None,
        micro_batches: int = 1,
    ) -> None:
        self.wait, self.watch, self.ranks, layout = wait, watch, ranks, layout or Layout()
        self.teacher, self.data, self.settings = teacher, data, settings
        self.folder, self.seed, self.observer, self.validate = folder, seed, observer, validate
        self.average = AveragedModel(model, multi_avg_fn=average_with_warmup(settings.ema_decay), use_buffers=True)
        self.model = lay_out(model, layout, ranks)
        lay_out_average(self.average.module, layout, ranks)
        self.student = Student(
            self.model,
            build_optimizer(bare(self.model), settings.optimizer),
            clip_norm=settings.optimizer.clip_norm,
            autocast=autocast,
            ranks=ranks,
            micro_batches=micro_batches,
        )
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, identity, ranks)
        self.at = Progress()

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns figures for the record. The average is the result.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the last checkpoint is intact.
            Interrupted: the observer asked to stop; the present step was saved.
            RanksError: a process did not take part within the time allowed; says which.
        """
        with self.ranks.watched("training"):
            return self._run()

    def averaged_state(self) -> dict[str, Tensor]:
        """Weights and batch statistics of the moving average, on the first rank ({} on others). All must call."""
        if self.ranks.world == 1:
            return self.average.module.state_dict()
        return full_state(self.average.module, self.ranks)

    def _run(self) -> dict[str, Any]:
        self._restore()
        clock, saved = time.monotonic(), time.monotonic()
        before = self.at.seconds
        self.model.train()
        with MetricsLog(self.folder, self.at.step) if self.ranks.first else nullcontext() as log:
            self.watch(self.at.step)
            while self.at.step < self.settings.steps:
                self._one_step()
                self.watch(self.at.step)
                self.at.seconds = before + time.monotonic() - clock
                self._log(log)
                stop, late = self._agreed(self.observer.stop_requested(), time.monotonic() - saved)
                last = self.at.step == self.settings.steps
                due = self.at.step % self.settings.checkpoint_every == 0
                if last or stop or due or late:
                    self._save()
                    saved = time.monotonic()
                if stop and not last:
                    raise Interrupted(f"stopped after step {self.at.step} of {self.settings.steps}")
        return {
            "steps": self.at.step,
            "batch": self.settings.batch,
            "train_seconds": round(self.at.seconds, 3),
        }

    def _agreed(self, stop: bool, seconds: float) -> tuple[bool, bool]:
        """(whether some rank was asked to stop, whether a checkpoint is due by the clock), the same on all ranks."""
        late = seconds > self.settings.checkpoint_seconds
        told = {int(value) for value in self.ranks.every(stop + 2 * late)}
        return any(value & 1 for value in told), any(value & 2 for value in told)

    def _one_step(self) -> None:
        step = self.at.step
        set_learning_rate(self.student.optimizer, self._learning_rate(step))
        own = (self.ranks.rank,) if self.ranks.rank else ()
        torch.manual_seed(derive_seed(self.seed, "masks", step, *own))  # dropout, drop path: a function of the step
        waits = step < self.wait
        wish: Wish = "nothing" if waits else self.teacher.wish(step)
        batch = self.data.batch(step)
        labelled = None if wish == "nothing" else self.data.feedback(step)
        try:
            metrics = train_step(self.student, self.teacher, batch, labelled, wish, waits=waits)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error}; training stopped before that update (step {step + 1} of {self.settings.steps}). "
                "Lower the learning rate, lengthen the warm-up, or set optimizer.clip_norm; "
                "the last checkpoint is intact"
            ) from error
        if not waits:
            self.average.update_parameters(bare(self.model))
        for name, value in metrics.items():
            self.at.sums[name] = self.at.sums.get(name, 0.0) + float(value)
            self.at.counts[name] = self.at.counts.get(name, 0) + 1
        self.at.step = step + 1

    def _log(self, log: MetricsLog | None) -> None:
        """A row of means since the last row, at the interval, at a validation and at the end."""
        step, last = self.at.step, self.at.step == self.settings.steps
        look = last or (self.settings.evaluate_every and step % self.settings.evaluate_every == 0)
        if not (look or step % self.settings.log_every == 0):
            self.observer.progress(step, self.settings.steps, {})
            return
        self._share_sums()
        values = {name: total / self.at.counts[name] for name, total in self.at.sums.items()}
        values["learning_rate"] = self._learning_rate(step - 1)
        values["images_per_second"] = step * self.settings.batch / max(self.at.seconds, 1e-9)
        if look:
            values |= self.validate(self.average.module)
        self.at.sums, self.at.counts = {}, {}
        if log is not None:
            log.write(step, values)
        self.observer.progress(step, self.settings.steps, values)

    def _share_sums(self) -> None:
        """Every rank's sums become their mean over the ranks."""
        if self.ranks.world > 1 and self.at.sums:
            device = next(self.model.parameters()).device
            sums = [torch.tensor(list(self.at.sums.values()), dtype=torch.float64, device=device)]
            self.ranks.mean_(sums)
            self.at.sums = dict(zip(self.at.sums, sums[0].tolist(), strict=True))

    def _learning_rate(self, step: int) -> float:
        settings = self.settings
        if step < self.wait:
            return 0.0
        return learning_rate(settings.schedule, settings.optimizer.lr, step - self.wait, settings.steps - self.wait)

    def _networks(self) -> Networks:
        own: Networks = {"student": (self.model, self.student.optimizer), "average": (self.average, None)}
        return {**own, **self.teacher.networks()}

    def _save(self) -> None:
        self._share_sums()
        progress = {"seconds": self.at.seconds, "sums": self.at.sums, "counts": self.at.counts}
        values = {"progress": progress, "teacher": self.teacher.values()}
        self.checkpoints.save_networks(self.at.step, self._networks(), values)

    def _restore(self) -> None:
        found = self.checkpoints.restore_networks(self._networks())
        if found is None:
            return
        step, values, warnings = found
        for warning in warnings:
            self.observer.note(warning)
        self.teacher.load_values(values["teacher"])
        self.student.steps_taken = max(0, step - self.wait)
        self.at = Progress(step=step, **values["progress"])
        self.observer.note(f"goes on from step {step} of {self.settings.steps}")
