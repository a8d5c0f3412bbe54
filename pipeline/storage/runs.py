"""A run directory: its recipe, its lock, and for each stage a record of what was completed.

A stage is done when its record exists and the *basis* in it (settings and fingerprints of inputs) equals the
present one. A stage that began and did not end left `started.json` with its basis: the same basis goes on,
another one is refused, so nothing that took time is overwritten by accident.
"""

import json
import os
import platform
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import filelock

import pipeline
from pipeline.config import Recipe, parse_recipe
from pipeline.errors import RunError
from pipeline.storage.files import (
    TEMPORARY,
    Location,
    fingerprint,
    names_in,
    opened,
    read_json,
    write_json,
    write_sealed,
    write_text,
)

FORMAT = 1
NOT_DONE = "not done yet"
RUN_FILE, RECORD_FILE, STARTED_FILE, LOCK_FILE = "run.json", "record.json", "started.json", ".lock"
NETWORKS_FOLDER = "networks"  # those that a person brings
BEFORE = (LOCK_FILE, NETWORKS_FOLDER)  # what may be there before there is a run
STORE_FILE = "store.json"  # which run a store outside a run directory belongs to


Longer = Literal["goes on", "is another training"]  # what more steps of a finished training are


class Action(StrEnum):
    """What a stage would do."""

    RUN = "run"
    RESUME = "resume"
    SKIP = "skip"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Decision:
    """What a stage would do, and why, in words for a person."""

    action: Action
    reason: str


class Run:
    """One run directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def told(self, place: Path) -> str:
        """A place as records have it: relative to the run where it is inside, so that a run can be moved or copied."""
        root, place = self.root.resolve(), place.resolve()
        return str(place.relative_to(root)) if place.is_relative_to(root) else str(place)

    def place(self, told: str) -> Path:
        """A place that a record tells."""
        return (self.root / told).resolve()

    @property
    def description(self) -> dict[str, Any] | None:
        """run.json, or None where there is no run yet.

        Raises:
            RunError: the directory holds something else, or run.json is damaged.
        """
        path = self.root / RUN_FILE
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"{self.root} is a file; --run must name a directory")
        if not path.exists():
            foreign = [] if not self.root.is_dir() else [e.name for e in self.root.iterdir() if e.name not in BEFORE]
            if foreign:
                raise RunError(
                    f"{self.root} is not a run directory: it has no {RUN_FILE}, but holds "
                    f"{', '.join(sorted(foreign)[:3])}{'…' if len(foreign) > 3 else ''}. Choose another --run; "
                    "nothing was changed"
                )
            return None
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RunError(f"{path} was written by another version (format {FORMAT} is expected)")
        return content

    def recipe(self) -> Recipe | None:
        """The recipe kept with the run, or None where there is no run yet."""
        description = self.description
        return None if description is None else parse_recipe(description["recipe"], str(self.root / RUN_FILE))

    def keep(self, recipe: Recipe, seed: int, data: str | None, store: str | None = None) -> None:
        """Write run.json: the recipe in full, the seed, the data folder, the store, versions and machine."""
        description = self.description or {"created": now()}
        tree = recipe.model_dump(mode="json")
        settings = {"recipe": tree, "seed": seed, "data": data, "store": store}
        if description.items() >= settings.items():
            return
        write_json(
            self.root / RUN_FILE,
            {
                "format": FORMAT,
                "created": description["created"],
                "id": description.get("id") or uuid.uuid4().hex,
                "recipe": tree,
                "seed": seed,
                "data": data,
                "store": store,
                "versions": versions(),
                "machine": machine(),
            },
        )

    def restorer(self) -> Callable[[], None]:
        """What puts run.json back to what it is now."""
        path = self.root / RUN_FILE
        before = path.read_text(encoding="utf-8") if path.exists() else None

        def undo() -> None:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                write_text(path, before)

        return undo

    def claim(self, store: Location) -> None:
        """Make a store outside the run directory this run's own, or see that it is.

        Raises:
            RunError: it is another run's.
        """
        description = self.description
        assert description is not None
        path = store / STORE_FILE
        owner = {"run": description["id"]}
        try:
            with opened(path) as file:
                content = json.loads(file.read())
        except FileNotFoundError:
            if foreign := sorted(name for name in names_in(store) if not TEMPORARY.fullmatch(name)):
                raise RunError(
                    f"the store {store} holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''} and was not "
                    f"made by mpl (it has no {STORE_FILE}); give an empty or a new folder. Nothing was changed"
                ) from None
            write_json(path, owner | {"root": str(self.root.resolve())})
            return
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); run the same command again") from error
        if content.get("run") != owner["run"]:
            raise RunError(
                f"the store {store} belongs to the run {content.get('root')}; give each run a --store of its own "
                f"(or remove {path} if that run is gone)"
            )

    @property
    def decoded(self) -> Path:
        """Folder of decoded images that are too many for memory; of no use once a stage is done."""
        return self.root / "decoded"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; the system releases it however the process ends.

        Raises:
            RunError: another process holds it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run directory {self.root}: {error.strerror}") from error
        lock = filelock.FileLock(self.root / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(
                f"run directory {self.root} is in use by another process; wait for it (mpl status --run {self.root} "
                "shows how far it is), or choose another --run"
            ) from None
        except OSError as error:
            raise RunError(f"cannot lock {self.root}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, or None."""
        path = self.root / stage / RECORD_FILE
        return read_json(path) if path.exists() else None

    def require(self, stage: str, command: str) -> dict[str, Any]:
        """The record of an earlier stage.

        Raises:
            RunError: it is not finished; names the command to run.
        """
        record = self.record(stage)
        if record is None:
            raise RunError(f"{self.root} has no finished {stage}. Run first: {command} --run {self.root}")
        return record

    def decide(
        self,
        stage: str,
        basis: dict[str, Any],
        outputs: Sequence[Location],
        *,
        force: bool,
        cheap: frozenset[str] = frozenset(),
        longer: Longer | None = None,
    ) -> Decision:
        """What the stage would do with this basis.

        Args:
            stage: its name.
            basis: settings and fingerprints of inputs.
            outputs: paths that exist when it is done.
            force: make again whatever is there.
            cheap: top-level keys of the basis that may change without being refused.
            longer: of a training, what more steps of it are.
        """
        done = self.record(stage)
        missing = [path for path in outputs if not path.exists()]
        started_path = self.root / stage / STARTED_FILE
        started = read_json(started_path) if started_path.exists() else None
        if force:
            return Decision(Action.RUN, "--force: what is there is made again")
        if started is not None and started["fingerprint"] == fingerprint(basis):
            return Decision(Action.RESUME, "goes on where it was interrupted")
        before = done or started
        if before is not None and longer and (steps := _more_steps(before["basis"], basis)):
            if longer == "goes on":
                return Decision(Action.RESUME, f"goes on: {steps}")
            return Decision(
                Action.REFUSE,
                f"{self.root}: {stage} was {'done' if done else 'begun'} with fewer steps ({steps}), and cannot be "
                "continued: its learning rate falls until the last step (schedule.kind: cosine), so every step "
                "differs. Give --force to make it again, or another --run to keep both; with schedule.kind: "
                "constant or exponential a training can be made longer",
            )
        if done is not None:
            if done["fingerprint"] == fingerprint(basis):
                if not missing:
                    return Decision(Action.SKIP, "already done: inputs and settings are unchanged")
                return Decision(Action.RUN, f"{missing[0]} is missing and is made again")
            return self._changed(f"{stage} was done with other inputs or settings", done["basis"], basis, cheap)
        if started is not None:
            return self._changed(f"{stage} was begun with other inputs or settings", started["basis"], basis, cheap)
        return Decision(Action.RUN, NOT_DONE)

    def _changed(self, what: str, before: dict[str, Any], after: dict[str, Any], cheap: frozenset[str]) -> Decision:
        changes = "; ".join(differences(before, after)) or "the format changed"
        if {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} <= cheap:
            return Decision(Action.RUN, f"made again: {changes}")
        return Decision(
            Action.REFUSE,
            f"{self.root}: {what} ({changes}). Give --force to make it again, or another --run to keep both",
        )

    def begin(self, stage: str, basis: dict[str, Any], launch: str = "", *, beside: bool = False) -> None:
        """Mark the stage as begun; its former record goes, so a half-made output is never taken for done.

        It stays where the new output is made `beside` the old one, which is then as good as before.
        """
        folder = self.root / stage
        if not beside:
            (folder / RECORD_FILE).unlink(missing_ok=True)
        write_sealed(
            folder / STARTED_FILE,
            {
                "basis": basis,
                "fingerprint": fingerprint(basis),
                "started": now(),
                "process": os.getpid(),
                "launch": launch,
            },
        )

    def beside(self, stage: str) -> set[str]:
        """Names in the run directory, but for what every run has and the stage's own folder."""
        names = {entry.name for entry in self.root.iterdir()} if self.root.is_dir() else set()
        return names - {RUN_FILE, stage, *BEFORE}

    def withdraw(self, stage: str) -> None:
        """As if the stage had not begun."""
        (self.root / stage / STARTED_FILE).unlink()
        with suppress(OSError):
            (self.root / stage).rmdir()  # unless there is something of another time

    def launch_of(self, stage: str) -> str | None:
        """Which launch of several processes (`Ranks.launch`) began the stage last; None where there was none."""
        paths = (self.root / stage / name for name in (STARTED_FILE, RECORD_FILE))
        return next((read_json(path).get("launch") for path in paths if path.exists()), None)

    def finish(self, stage: str, basis: dict[str, Any], seconds: float, result: dict[str, Any]) -> dict[str, Any]:
        """Write the record, last of all; returns it."""
        started = read_json(self.root / stage / STARTED_FILE)
        record = {
            "format": FORMAT,
            "stage": stage,
            "fingerprint": fingerprint(basis),
            "basis": basis,
            "started": started["started"],
            "launch": started["launch"],
            "ended": now(),
            "seconds": round(seconds, 3),
            "peak_memory_mib": round(peak_memory_mib(), 1),
            "versions": versions(),
            "result": result,
        }
        write_sealed(self.root / stage / RECORD_FILE, record)
        (self.root / stage / STARTED_FILE).unlink(missing_ok=True)
        return record


def _more_steps(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """'settings.steps: 1 → 2' where the bases differ in nothing else, and the steps are more."""
    changes = differences(before, after)
    if len(changes) != 1 or not changes[0].startswith("settings.steps: "):
        return None
    return changes[0] if after["settings"]["steps"] > before["settings"]["steps"] else None


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """'a.b: 1 → 2' for every leaf that differs; long values are cut."""
    if isinstance(before, dict) and isinstance(after, dict):
        leaves = []
        for name in sorted(before.keys() | after.keys()):
            path = f"{key}.{name}" if key else name
            leaves += differences(before.get(name), after.get(name), path)
        return leaves
    return [] if before == after else [f"{key}: {_short(before)} → {_short(after)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def now() -> str:
    """Present time, UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    names = ("torch", "torchvision", "timm", "numpy", "pyarrow", "pillow")
    packages = {"mpl": pipeline.__version__, "python": platform.python_version()}
    for name in names:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "absent"
    return packages


def machine() -> dict[str, Any]:
    """What a reader needs to place a time or a memory figure."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}


def peak_memory_mib() -> float:
    """Peak of this process: memory of the accelerator where one was used, else resident memory, MiB."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
