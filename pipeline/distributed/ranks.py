"""The processes of one training, and how they agree.

A process alone is `ALONE`: every method then does nothing or returns its argument, and no process group is
needed. Agreements go over gloo, on the CPU, also where gradients go over NCCL: a rank that does not come becomes
an error that names it, instead of a hang.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import errors
from pipeline.errors import NonFiniteError, RanksError, UsageError, UserError

BUCKET = 64 << 20  # bytes per all-reduce of many small tensors
REPORT = 10.0  # seconds in which the ranks that were left waiting say so


@dataclass(frozen=True)
class Ranks:
    """One process among `world`.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
        timeout: seconds that a rank waits for the others, in every collective.
        group: gloo group of all ranks for agreements; None where the default group is gloo.
        store: keys that all ranks see, for finding out who is missing.
        launch: the same for every attempt that one torchrun makes, and for no other.
    """

    rank: int
    world: int
    timeout: float = 600.0
    group: Any = field(default=None, compare=False, repr=False)
    store: Any = field(default=None, compare=False, repr=False)
    launch: str = field(default="", compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, count: int, what: str) -> int:
        """This rank's part of `count` images per step; `what` names the setting.

        Raises:
            UsageError: the ranks cannot have equal parts.
        """
        if count % self.world:
            near = {count // self.world * self.world, -(-count // self.world) * self.world} - {0}
            raise UsageError(
                f"{what} (={count}) must be a multiple of the number of processes (={self.world}); "
                f"set it to {' or '.join(map(str, sorted(near)))}, or start another number of processes"
            ).on_all()
        return count // self.world

    def part(self, total: int) -> slice:
        """This rank's rows of a global batch that the ranks divide."""
        size = total // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    # --- tensors -----------------------------------------------------------------------------------------

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average each tensor over the ranks, in place; a few large messages instead of many small ones."""
        if self.world == 1:
            return
        with self.watched("an average of gradients"):
            for bucket in _buckets(tensors):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                flat /= self.world
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(part.view_as(t))

    def mean(self, value: Tensor) -> Tensor:
        """The average of a tensor over the ranks; `value` itself is left alone."""
        if self.world == 1:
            return value
        result = value.detach().clone()
        self.mean_([result])
        return result

    def gathered(self, rows: Tensor) -> list[Tensor]:
        """A tensor of every rank, on the CPU and of one shape, in their order."""
        if self.world == 1:
            return [rows]
        tensors = [torch.empty_like(rows) for _ in range(self.world)]
        with self.watched("a gathering of results"):
            dist.all_gather(tensors, rows, group=self.group)
        return tensors

    # --- agreements --------------------------------------------------------------------------------------

    def every(self, value: float) -> list[float]:
        """One number of every rank, in their order."""
        if self.world == 1:
            return [value]
        numbers = [torch.zeros(1, dtype=torch.float64) for _ in range(self.world)]
        with self.watched("an agreement"):
            dist.all_gather(numbers, torch.tensor([value], dtype=torch.float64), group=self.group)
        return [float(number) for number in numbers]

    def texts(self, value: str) -> list[str]:
        """One text of every rank, in their order."""
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(value.encode()) + b"\0", dtype=torch.uint8)
        sizes = [int(n) for n in self.every(len(own))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        texts = [torch.zeros_like(padded) for _ in sizes]
        with self.watched("an agreement"):
            dist.all_gather(texts, padded, group=self.group)
        return [bytes(t[: n - 1].tolist()).decode() for t, n in zip(texts, sizes, strict=True)]

    def agree(self, ok: bool) -> bool:
        """Whether it is so on all ranks."""
        return all(self.every(float(ok)))

    def finite(self, value: float, what: str) -> list[float]:
        """The value of every rank, none of which is NaN or infinite.

        Raises:
            NonFiniteError: on all ranks, naming those where it is not.
        """
        values = self.every(value)
        non_finite = [rank for rank, number in enumerate(values) if not math.isfinite(number)]
        if non_finite:
            where = "" if self.world == 1 else f" on {_names(non_finite)}"
            raise NonFiniteError(f"{what} is {values[non_finite[0]]}{where}")
        return values

    def raise_together(self, error: UserError | None) -> None:
        """Raise on all ranks the error of some of them, naming these; nothing where none has one.

        Raises:
            UserError: of the first such rank's class and text.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return
        if self.agree(error is None):
            return
        reports = [text.partition("\n") for text in self.texts(f"{type(error).__name__}\n{error}" if error else "")]
        failed = {rank: (kind, text) for rank, (kind, _, text) in enumerate(reports) if kind}
        kind, text = next(iter(failed.values()))
        everywhere = len(failed) == self.world and len(set(failed.values())) == 1
        raise _as_error(kind, text if everywhere else f"{_names(list(failed))}: {text}") from error

    def together(self, work: Callable[[], Any]) -> Any:
        """What `work`, which talks to no other rank, returns; what it raises on some rank is raised on all.

        Raises:
            UserError: as `raise_together`.
        """
        result, failure = None, None
        try:
            result = work()
        except UserError as error:
            failure = error
        self.raise_together(failure)
        return result

    def check_same(self, what: str, value: str) -> None:
        """All ranks must have the same `value`, a fingerprint say.

        Raises:
            UsageError: on all ranks, naming those that differ from rank 0.
        """
        values = self.texts(value)
        if different := [rank for rank, text in enumerate(values) if text != values[0]]:
            raise UsageError(
                f"the ranks disagree on {what}: {_names(different)} (of {self.world}) not as rank 0; start all of "
                "them with the same command, the same recipe file and the same version of this project"
            ).on_all()

    def barrier(self, what: str) -> None:
        """Wait until all ranks have come to `what`.

        Raises:
            RanksError: naming the ranks that did not come in time.
        """
        if self.world > 1:
            with self.watched(what):
                dist.monitored_barrier(self.group, timedelta(seconds=self.timeout), wait_all_ranks=True)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """A collective that fails within becomes an error that says which ranks did not take part, and why.

        Raises:
            UserError: the error of another rank (`reporting`), of that class.
            RanksError: on every rank that was left waiting, where no rank has said why.
        """
        if self.world == 1:
            yield
            return
        try:
            yield
        except RuntimeError as error:
            if not _of_a_collective(error):
                raise
            if cause := self._error_elsewhere():
                raise cause from error
            missing = self._missing(str(error))
            who = f"{_names(missing)} of {self.world} did not take part" if missing else "the connection broke"
            raise RanksError(
                f"rank {self.rank}, at {what}: {who}, within {self.timeout:g} s ({str(error).splitlines()[0][:200]}). "
                "A process died, hangs, or is slower than that; its own output says more. The last checkpoint is "
                "intact: start again, or let torchrun do so (--max-restarts)"
            ) from error

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """An error of this rank is raised at once; others that wait for it meanwhile find it in the store."""
        try:
            yield
        except RanksError:
            raise  # the error of others
        except Exception as error:
            if self.store is not None:
                with suppress(RuntimeError):  # rank 0 has gone, and the store with it
                    self.store.compare_set("error", "", f"{self.rank}\n{type(error).__name__}\n{error}")  # the first
            raise

    def _error_elsewhere(self) -> UserError | None:
        """The error of the first rank that had one."""
        with suppress(RuntimeError):  # as above
            if self.store is not None and self.store.check(["error"]):
                rank, kind, text = self.store.get("error").decode().split("\n", 2)
                return _as_error(kind, f"rank {rank}: {text if hasattr(errors, kind) else f'{kind}: {text}'}")
        return None

    def _missing(self, message: str) -> list[int]:
        """The ranks that do not report, within REPORT seconds, to have been left waiting as well."""
        if named := re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", message):
            return [int(n) for n in named[1].replace(" ", "").split(",")]
        if self.store is None:
            return []
        try:
            self.store.set(f"waiting/{self.rank}", "1")
            return absent(self.store, "waiting", self.world, REPORT)
        except RuntimeError:
            return [0]  # rank 0 keeps the store, where torchrun's agent does not


ALONE = Ranks(0, 1)


def _as_error(kind: str, text: str) -> UserError:
    """An error of this class of ours; of another class, a defect's say, it is a RanksError."""
    return getattr(errors, kind, RanksError)(text).on_all()


def absent(store: Any, name: str, world: int, timeout: float) -> list[int]:
    """The ranks whose key `name/rank` does not appear in the store within `timeout` seconds."""
    keys = [f"{name}/{rank}" for rank in range(world)]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def _of_a_collective(error: RuntimeError) -> bool:
    words = (
        "gloo",
        "NCCL",
        "nccl",
        "monitoredBarrier",
        "Connection closed",
        "Connection reset",
        "Broken pipe",
        "pair closure",
    )
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, up to BUCKET bytes (or one larger tensor)."""
    result: list[list[Tensor]] = []
    last: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], float]] = {}
    for t in tensors:
        size = t.numel() * t.element_size()
        bucket, filled = last.get((t.dtype, t.device), ([], math.inf))
        if filled + size > BUCKET:
            bucket, filled = [], 0
            result.append(bucket)
        bucket.append(t)
        last[t.dtype, t.device] = (bucket, filled + size)
    return result
