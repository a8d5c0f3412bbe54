"""Images per second of full Meta Pseudo Labels, end to end, against the loop that people usually write.

    python -m benchmarks.train_mpl --data DATA       (CIFAR-10's JPEGs; without --data, crops of photographs)
    python -m benchmarks.train_mpl --device cuda --precision bf16 --workers 8 --batches 16 64 512

WRN-28-2, RandAugment of two operations and cutout, L labelled images and 7 L of the pool in a step. Ours: the very
step of `mpl train-mpl`, with hard and with soft feedback. The usual loop (benchmarks/usual_mpl.py): Pillow in
workers, hard feedback; once as people run it, once with our memory format. All begin with decoded pixels in memory.

Rounds are interleaved; the workers of a loop are stopped while another has its turn, so that none works ahead at
another's cost. Beside wall time there is processor time, of the workers too, and its part that is not the networks'.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.images import jpegs
from benchmarks.record import write_table
from benchmarks.usual_mpl import UsualLoop, loaders
from pipeline.batches import Batches, ImageSets, MethodViews
from pipeline.config import AugmentSettings, ModelSettings, OptimizerSettings, TrainMplSettings
from pipeline.data.decoded import load_images
from pipeline.data.manifest import load_manifest
from pipeline.data.readers.shard import Sample
from pipeline.data.sets import LabelledSet, PoolSet
from pipeline.data.sources import open_split
from pipeline.distributed.placement import Placement
from pipeline.methods.uda import Uda
from pipeline.networks.network import build_network
from pipeline.optim import build_optimizer, learning_rate
from pipeline.storage.files import location
from pipeline.teacher_network import TeacherNetwork, TeacherRule
from pipeline.training import Journal, Training

SIDE, CLASSES, RATIO = 32, 10, 7
NAMES = tuple(map(str, range(CLASSES)))
STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's mean and standard deviation
LABELLED, POOL = 4_000, 8_000  # images held
OURS, OURS_SOFT = "ours, hard feedback", "ours, soft feedback"
USUAL, USUAL_FORMAT = "usual loop", "usual loop, channels last"


class Contender:
    """Something that trains, one step after another, and records where the time went.

    Attributes:
        wall: seconds of each turn.
        used: processor seconds of each turn, of workers too.
        network: of these, the networks' (with an accelerator: seconds, waiting for it).
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.wall: list[float] = []
        self.used: list[float] = []
        self.network: list[float] = []
        self.workers: list[int] = []  # process numbers
        self._data = 0.0

    def one_step(self) -> None:
        """Data and networks; the data's part of `clock` is added to `_data`."""
        raise NotImplementedError

    def turn(self, steps: int, *, counts: bool) -> None:
        """Take `steps` steps alone; the first turn, which warms up, does not count."""
        self.signal_workers(signal.SIGCONT)
        synchronise(self.device)
        self._data, began, clock, used = 0.0, time.perf_counter(), self.clock(), self._processor()
        for _ in range(steps):
            self.one_step()
        synchronise(self.device)
        wall, elapsed, used = time.perf_counter() - began, self.clock() - clock, self._processor() - used
        self.signal_workers(signal.SIGSTOP)
        if counts:
            self.wall.append(wall)
            self.used.append(used)
            self.network.append(elapsed - self._data)

    def clock(self) -> float:
        """Processor seconds of this process; with an accelerator, seconds after it has finished."""
        if self.device == "cpu":
            return time.process_time()
        synchronise(self.device)
        return time.perf_counter()

    def _processor(self) -> float:
        return time.process_time() + sum(map(processor_seconds, self.workers))

    def signal_workers(self, number: signal.Signals) -> None:
        """Let the workers stop or go on."""
        for process in self.workers:
            os.kill(process, number)


class Ours(Contender):
    """The training loop of `mpl train-mpl`, a step at a time."""

    def __init__(
        self, labelled: LabelledSet, pool: Tensor, settings: TrainMplSettings, a: argparse.Namespace, folder: Path
    ) -> None:
        super().__init__(a.device)
        device, autocast = torch.device(a.device), precision_of(a)
        student, teacher = (network(a.device) for _ in range(2))
        placement = Placement(device, autocast)
        sets = ImageSets(labelled, PoolSet(pool, torch.ones(len(pool), dtype=torch.int64)), *STATISTICS)
        rule = TeacherRule(
            settings.method,
            settings.feedback,
            settings.feedback_options,
            lambda step: learning_rate(settings.schedule, settings.optimizer.lr, step, settings.steps),
        )
        self.taught = TeacherNetwork(teacher, build_optimizer(teacher, settings.optimizer), rule, placement)
        self.views = Batches(sets, MethodViews(settings), placement=placement)
        self.training = Training(student, self.taught, self, settings, Journal(folder), placement=placement)
        student.train()

    def one_step(self) -> None:
        self.training._one_step()  # between two of them `run` only logs and saves

    def batch(self, step: int) -> Any:
        """As the views give it, timed."""
        began = self.clock()
        batch = self.views.batch(step)
        self._data += self.clock() - began
        return batch

    def feedback(self, step: int) -> Any:
        """As the views give it, timed."""
        began = self.clock()
        labelled = self.views.feedback(step)
        self._data += self.clock() - began
        return labelled


class Usual(Contender):
    """The usual loop."""

    def __init__(
        self,
        labelled: LabelledSet,
        pool: Tensor,
        settings: TrainMplSettings,
        a: argparse.Namespace,
        *,
        channels_last: bool,
    ) -> None:
        super().__init__(a.device)
        student, teacher = (network(a.device) for _ in range(2))
        self.loop = UsualLoop(teacher, student, settings, a.device, precision_of(a), channels_last=channels_last)
        others = {child.pid for child in active_children()}
        pin = a.device != "cpu"
        self.labelled, self.pool = loaders(labelled, pool, settings, STATISTICS, a.workers, pin)
        self.workers = [child.pid for child in active_children() if child.pid is not None and child.pid not in others]

    def one_step(self) -> None:
        began = self.clock()
        batch = self.loop.load(next(self.labelled), next(self.pool))
        self._data += self.clock() - began
        self.loop.step(*batch)


def synchronise(device: str) -> None:
    """Wait for the accelerator."""
    if device != "cpu":
        torch.cuda.synchronize()


def processor_seconds(process: int) -> float:
    """Used so far by a running process, in the system's ticks (0.01 s)."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def precision_of(a: argparse.Namespace) -> torch.dtype | None:
    """dtype of mixed precision, or None."""
    return torch.bfloat16 if a.precision == "bf16" else None


def network(device: str) -> torch.nn.Module:
    """A fresh one, on the device, channels last, in training mode."""
    torch.manual_seed(0)
    model = build_network(ModelSettings(name="wrn_28_2"), NAMES, SIDE, *STATISTICS).model
    return model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def settings_for(labelled_batch: int, feedback: str) -> TrainMplSettings:
    """A recipe's section: common settings for CIFAR-10 with 4,000 labels."""
    moved = {"flip": True, "crop_padding": 4}
    strong = AugmentSettings(**moved, randaugment_layers=2, randaugment_magnitude=9, cutout=16)
    options: dict[str, Any] = {"batch": labelled_batch, "augment": AugmentSettings(**moved)}
    return TrainMplSettings(
        steps=300_000,
        batch=RATIO * labelled_batch,
        labelled_batch=labelled_batch,
        model=ModelSettings(name="wrn_28_2"),
        method=Uda(temperature=0.8, threshold=0.6),
        optimizer=OptimizerSettings(rule="nesterov", lr=0.03, momentum=0.9, weight_decay=5e-4),
        weak=AugmentSettings(**moved),
        augment=strong,
        feedback=feedback,  # type: ignore[arg-type]
        feedback_options=options,  # type: ignore[arg-type]
    )


def decoded(data: str | None) -> tuple[LabelledSet, Tensor]:
    """Labelled images and the pool's pixels, decoded as `mpl train-mpl` does."""
    if data is None:
        files = (("made", Sample(i, str(i), file, i % CLASSES)) for i, file in enumerate(jpegs(LABELLED + POOL, SIDE)))
        made = load_images(files, SIDE)
        return LabelledSet(made.images[:LABELLED], made.labels[:LABELLED], CLASSES), made.images[LABELLED:]
    place = location(data)
    manifest = load_manifest("cifar10", place)
    labelled = load_images(open_split(manifest, "labelled", place, first=LABELLED).read(), SIDE)
    pool = load_images(islice(open_split(manifest, "unlabelled", place).read(), POOL), SIDE)
    return LabelledSet(labelled.images, labelled.labels, CLASSES), pool.images


def measured(
    labelled: LabelledSet, pool: Tensor, size: int, a: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Contender]]:
    """Every contender after its turns with `size` labelled images in a step."""
    hard, soft = settings_for(size, "hard"), settings_for(size, "soft")
    contenders = {
        USUAL: Usual(labelled, pool, hard, a, channels_last=False),
        USUAL_FORMAT: Usual(labelled, pool, hard, a, channels_last=True),
        OURS: Ours(labelled, pool, hard, a, folder / f"hard-{size}"),
        OURS_SOFT: Ours(labelled, pool, soft, a, folder / f"soft-{size}"),
    }
    try:
        for round_ in range(a.rounds + 1):
            for contender in contenders.values():
                contender.turn(a.steps, counts=round_ > 0)
    finally:
        for contender in contenders.values():
            contender.signal_workers(signal.SIGCONT)  # a stopped one could not end
    yield from contenders.items()


def row(size: int, name: str, contender: Contender, ours: Contender, steps: int) -> list[str]:
    """A line of the table."""
    images = (1 + RATIO) * size * steps
    ratios = [theirs / own for theirs, own in zip(contender.wall, ours.wall, strict=True)]
    by_processor = statistics.median(theirs / own for theirs, own in zip(contender.used, ours.used, strict=True))
    whole = contender.used if contender.device == "cpu" else contender.wall
    data = statistics.median(1 - network / all_ for network, all_ in zip(contender.network, whole, strict=True))
    spread = f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"
    return [
        f"{size} + {RATIO} × {size}",
        name,
        f"{images / statistics.median(contender.wall):.1f}",
        f"{images / statistics.median(contender.used):.1f}",
        f"{1000 * statistics.median(contender.network) / steps:,.0f} ms",
        f"{100 * data:.1f}%",
        "" if contender is ours else spread,
        "" if contender is ours else f"{by_processor:.2f}×",
    ]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with cifar10/ and a pool, as the manifest cifar10 says")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[16], help="labelled images in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, help="in a turn; 1, or 20 with an accelerator: more than workers fetch ahead"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the training process")
    parser.add_argument("--workers", type=int, default=2, help="processes of each of the usual loop's two loaders")
    a = parser.parse_args()
    a.steps = a.steps or (1 if a.device == "cpu" else 20)
    torch.set_num_threads(a.threads)
    labelled, pool = decoded(a.data)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in a.batches:
            contenders = dict(measured(labelled, pool, size, a, Path(folder)))
            rows += [row(size, name, contender, contenders[OURS], a.steps) for name, contender in contenders.items()]
            del contenders
    columns = [
        "batch",
        "",
        "images/s",
        "images per processor second",
        "networks, a step",
        "data",
        "our hard feedback is faster by",
    ]
    kind = a.device.split(":")[0]
    write_table(
        f"train-mpl-{kind}-{a.precision}",
        [*columns, "by processor time"],
        rows,
        f"python -m benchmarks.train_mpl{' --data DATA' if a.data else ''} --device {a.device} "
        f"--precision {a.precision} --batches {' '.join(map(str, a.batches))} --rounds {a.rounds} --steps {a.steps} "
        f"--threads {a.threads} --workers {a.workers}",
        f"WRN-28-2, {'CIFAR-10 and its pool' if a.data else 'crops of photographs'}, UDA teacher; "
        f"{len(os.sched_getaffinity(0))} core(s) for the training process and the loaders' workers together. "
        f"n = {a.rounds} interleaved rounds; medians; ratios are of the same round, with least and most.",
    )


if __name__ == "__main__":
    main()
