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

from pipeline.batches import Batch, Labelled
from pipeline.checkpoints import CHECKPOINTS, Checkpoints, Networks
from pipeline.config import TrainSettings
from pipeline.distributed.layouts import bare, full_state, lay_out, lay_out_average
from pipeline.distributed.placement import Placement
from pipeline.errors import NonFiniteError
from pipeline.optim import average_with_warmup, build_optimizer, learning_rate, set_learning_rate
from pipeline.seeds import derive_seed
from pipeline.storage.metrics import MetricsLog
from pipeline.student import Student
from pipeline.teachers import Metrics, Teacher, Wish


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


class Silent:
    """An observer that says nothing and never stops."""

    def note(self, text: str) -> None: ...

    def progress(self, done: int, total: int, values: dict[str, float]) -> None: ...

    def stop_requested(self) -> bool:
        return False


class BatchSource(Protocol):
    """What a training sees, as a pure function of the step; `pipeline.batches.Batches` is one."""

    def batch(self, step: int) -> Any:
        """The student's batch, a `Batch` of the kind that the teacher takes."""
        ...

    def feedback(self, step: int) -> Labelled:
        """Labelled images for the teacher's turn."""
        ...


@dataclass(frozen=True)
class Journal:
    """Where a training is written down, and who watches it.

    Attributes:
        folder: gets metrics.csv, tensorboard/ and checkpoints/.
        identity: fingerprint of what is trained, kept with the checkpoints.
        observer: told of progress.
        validate: figures of a network for the log (validation_top1 …); never for a choice.
        watch: told how many steps are done, at the start and after each.
    """

    folder: Path
    identity: str = ""
    observer: Observer = Silent()
    validate: Callable[[nn.Module], dict[str, float]] = lambda network: {}
    watch: Callable[[int], None] = lambda done: None


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
    student: Student, teacher: Teacher[Any, Any], batch: Batch, labelled: Labelled | None, wish: Wish
) -> Metrics:
    """One step of any method: the student learns from the teacher, then the teacher from the student.

    `labelled` goes with a `wish` of the teacher.
    """
    proposal = teacher.propose(batch)  # targets (B, C), differentiable in the teacher
    probe = (labelled.images, labelled.labels) if labelled is not None and wish == "losses" else None
    step = student.learn(batch.images, proposal.targets.detach(), batch.weight, replay=wish == "gradient", probe=probe)
    return step.metrics | teacher.adapt(proposal, step, labelled)


class Training:
    """A student, its teacher and its moving average, from the first step or a checkpoint to the last.

    Args:
        model: the student's network, on its device.
        teacher: gives targets and may adapt.
        batches: as a pure function of the step; of several processes each gets its part.
        settings: steps, optimiser, schedule, intervals.
        journal: where it is written down.
        seed: of dropout and drop path.
        placement: precision, processes, layout, micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher[Any, Any],
        batches: BatchSource,
        settings: TrainSettings,
        journal: Journal,
        *,
        seed: int = 0,
        placement: Placement = Placement(),
    ) -> None:
        self.teacher, self.batches, self.settings, self.journal, self.seed = teacher, batches, settings, journal, seed
        self.ranks, self.observer = placement.ranks, journal.observer
        self.average = AveragedModel(model, multi_avg_fn=average_with_warmup(settings.ema_decay), use_buffers=True)
        self.model = lay_out(model, placement.layout, self.ranks)
        lay_out_average(self.average.module, placement.layout, self.ranks)
        self.student = Student(
            self.model,
            build_optimizer(bare(self.model), settings.optimizer),
            clip_norm=settings.optimizer.clip_norm,
            autocast=placement.autocast,
            ranks=self.ranks,
            micro_batches=placement.micro_batches,
        )
        self.checkpoints = Checkpoints(journal.folder / CHECKPOINTS, journal.identity, self.ranks)
        self.progress = Progress()

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
        before = self.progress.seconds
        self.model.train()
        watch = self.journal.watch if self.ranks.first else lambda done: None
        with MetricsLog(self.journal.folder, self.progress.step) if self.ranks.first else nullcontext() as log:
            watch(self.progress.step)
            while self.progress.step < self.settings.steps:
                self._one_step()
                watch(self.progress.step)
                self.progress.seconds = before + time.monotonic() - clock
                self._log(log)
                stop, late = self._agreed(self.observer.stop_requested(), time.monotonic() - saved)
                last = self.progress.step == self.settings.steps
                due = self.progress.step % self.settings.checkpoint_every == 0
                if last or stop or due or late:
                    self._save()
                    saved = time.monotonic()
                if stop and not last:
                    raise Interrupted(f"stopped after step {self.progress.step} of {self.settings.steps}")
        return {
            "steps": self.progress.step,
            "batch": self.settings.batch,
            "train_seconds": round(self.progress.seconds, 3),
        }

    def _agreed(self, stop: bool, seconds: float) -> tuple[bool, bool]:
        """(whether some rank was asked to stop, whether a checkpoint is due by the clock), the same on all ranks."""
        late = seconds > self.settings.checkpoint_seconds
        flags = {int(value) for value in self.ranks.every(stop + 2 * late)}
        return any(value & 1 for value in flags), any(value & 2 for value in flags)

    def _one_step(self) -> None:
        step = self.progress.step
        set_learning_rate(self.student.optimizer, self._learning_rate(step))
        own = (self.ranks.rank,) if self.ranks.rank else ()
        torch.manual_seed(derive_seed(self.seed, "masks", step, *own))  # dropout, drop path: a function of the step
        waits = step < self.settings.wait
        wish: Wish = "nothing" if waits else self.teacher.wish(step)
        batch = self.batches.batch(step)
        labelled = None if wish == "nothing" else self.batches.feedback(step)
        try:
            if waits:
                metrics = self.teacher.adapt(self.teacher.propose(batch), None, None)
            else:
                metrics = train_step(self.student, self.teacher, batch, labelled, wish)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error}; training stopped before that update (step {step + 1} of {self.settings.steps}). "
                "Lower the learning rate, lengthen the warm-up, or set optimizer.clip_norm; "
                "the last checkpoint is intact"
            ) from error
        if not waits:
            self.average.update_parameters(bare(self.model))
        for name, value in metrics.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + float(torch.as_tensor(value).detach())
            self.progress.counts[name] = self.progress.counts.get(name, 0) + 1
        self.progress.step = step + 1

    def _log(self, log: MetricsLog | None) -> None:
        """A row of means since the last row, at the interval, at a validation and at the end."""
        step, last = self.progress.step, self.progress.step == self.settings.steps
        look = last or (self.settings.evaluate_every and step % self.settings.evaluate_every == 0)
        if not (look or step % self.settings.log_every == 0):
            self.observer.progress(step, self.settings.steps, {})
            return
        self._share_sums()
        values = {"learning_rate": self._learning_rate(step - 1)}
        values |= {name: total / self.progress.counts[name] for name, total in self.progress.sums.items()}
        values["images_per_second"] = step * self.settings.batch / max(self.progress.seconds, 1e-9)
        if look:
            values |= self.journal.validate(self.average.module)
        self.progress.sums, self.progress.counts = {}, {}
        if log is not None:
            log.write(step, values)
        self.observer.progress(step, self.settings.steps, values)

    def _share_sums(self) -> None:
        """Every rank's sums become their mean over the ranks."""
        if self.ranks.world > 1 and self.progress.sums:
            device = next(self.model.parameters()).device
            sums = [torch.tensor(list(self.progress.sums.values()), dtype=torch.float64, device=device)]
            self.ranks.mean_(sums)
            self.progress.sums = dict(zip(self.progress.sums, sums[0].tolist(), strict=True))

    def _learning_rate(self, step: int) -> float:
        settings, wait = self.settings, self.settings.wait
        if step < wait:
            return 0.0
        return learning_rate(settings.schedule, settings.optimizer.lr, step - wait, settings.steps - wait)

    def _networks(self) -> Networks:
        own: Networks = {"student": (self.model, self.student.optimizer), "average": (self.average, None)}
        return {**own, **self.teacher.networks()}

    def _save(self) -> None:
        self._share_sums()
        progress = {"seconds": self.progress.seconds, "sums": self.progress.sums, "counts": self.progress.counts}
        values = {"progress": progress, "teacher": self.teacher.values()}
        self.checkpoints.save_networks(self.progress.step, self._networks(), values)

    def _restore(self) -> None:
        checkpoint = self.checkpoints.restore_networks(self._networks())
        if checkpoint is None:
            return
        step, values, warnings = checkpoint
        for warning in warnings:
            self.observer.note(warning)
        self.teacher.load_values(values["teacher"])
        self.student.steps_taken = max(0, step - self.settings.wait)
        self.progress = Progress(step=step, **values["progress"])
        self.observer.note(f"goes on from step {step} of {self.settings.steps}")
