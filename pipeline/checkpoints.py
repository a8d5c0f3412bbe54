"""Checkpoints of a training run: whole files with checksums, the newest two, loaded without unpickling code.

A single process writes one file per checkpoint; several processes write one folder, each of them what it holds.
Either is read by any number of processes.
"""

import json
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.distributed.sharded import placed_like
from pipeline.errors import CheckpointError, UserError
from pipeline.named_tensors import Networks, restoring, tensors_of
from pipeline.storage.files import discard, read_json, sha256_file, sync_folder, whole_file, write_json

KEPT = 2
CHECKPOINTS = "checkpoints"  # folder, beside the network that is trained
INDEX = "index.json"
VALUES = "values.json"


class Checkpoints:
    """The checkpoints in one folder, which all ranks must see.

    Args:
        folder: made when the first one is saved.
        identity: fingerprint of what is trained; a checkpoint of something else is refused.
        ranks: the processes that save and restore together.
    """

    def __init__(self, folder: Path, identity: str, ranks: Ranks = ALONE) -> None:
        self.folder, self.identity, self.ranks = folder, identity, ranks

    def save_networks(self, step: int, networks: Networks, values: dict[str, Any]) -> None:
        """Write step's checkpoint, then the index, then drop those older than the newest two. All ranks call it.

        Args:
            step: of the training.
            networks: label → (network, its optimiser or None), in whatever layout.
            values: what else to keep, as JSON; rank 0's counts.

        Raises:
            RunError: it cannot be written, on whatever rank; the earlier ones are intact.
        """
        tensors = tensors_of(networks)
        if self.ranks.world == 1:
            self._save_file(step, tensors, values)
            return
        from pipeline.distributed.checkpoint import write_shards

        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        self._first(lambda: _make_empty(temporary))
        write_shards(temporary, tensors, self.ranks)
        mine = {file.name: sha256_file(file) for file in sorted(temporary.glob(f"__{self.ranks.rank}_*"))}
        sums = {name: found for text in self.ranks.texts(json.dumps(mine)) for name, found in json.loads(text).items()}

        def finish() -> None:
            write_json(temporary / VALUES, values)
            for file in temporary.iterdir():
                sums.setdefault(file.name, sha256_file(file))
            sync_folder(temporary)
            discard(path)
            temporary.rename(path)
            sync_folder(self.folder)
            self._note({"step": step, "file": path.name, "sha256": sums})

        self._first(finish)

    def restore_networks(self, networks: Networks) -> tuple[int, dict[str, Any], list[str]] | None:
        """Put the newest sound checkpoint into the networks and optimisers, in place. All ranks call it.

        Returns:
            (step, values, warnings), the same on all ranks; None where none was ever saved.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged, or of another training or network.
        """
        entries = self._agreed_entries()
        warnings: list[str] = []
        for entry in reversed(entries):
            path = self.folder / entry["file"]
            problem = self._agreed(_problem_of_share(path, entry["sha256"], self.ranks))
            if problem is None:
                values: dict[str, Any] = {}
                try:
                    values = self._read(entry, networks)
                except (CheckpointError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
                    problem = str(error).splitlines()[0]
                problem = self._agreed(problem)
                if problem is None:
                    return entry["step"], values, warnings
            warnings.append(f"checkpoint {path} cannot be used: {problem}")
        if entries:
            raise CheckpointError("\n".join([*warnings, "No sound checkpoint is left; start again with --force"]))
        return None

    def _save_file(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """A single process's checkpoint."""
        path = self.folder / f"step-{step:08d}.pt"
        with whole_file(path) as temporary:
            try:
                torch.save({"tensors": tensors, "values": values}, temporary)
            except RuntimeError as error:  # torch's writer reports a full disk this way
                raise OSError(str(error)) from error
        self._note({"step": step, "file": path.name, "sha256": sha256_file(path)})

    def _read(self, entry: dict[str, Any], networks: Networks) -> dict[str, Any]:
        """Fill the networks from one checkpoint; returns its values."""
        path = self.folder / entry["file"]
        if isinstance(entry["sha256"], dict):
            from pipeline.distributed.checkpoint import read_shards, stored_tensors

            with ExitStack() as opened:
                tensors = self.ranks.together(lambda: opened.enter_context(restoring(networks, stored_tensors(path))))
                read_shards(path, tensors, self.ranks)  # all ranks talk: none may have failed before
            return dict(read_json(path / VALUES))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found: dict[str, Tensor] = state["tensors"]
        with restoring(networks, {name: (t.shape, t.dtype) for name, t in found.items()}) as tensors, torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(placed_like(found[name], tensor))
        return dict(state["values"])

    def _note(self, entry: dict[str, Any]) -> None:
        """Put a checkpoint into the index, and drop those older than the newest two."""
        entries = [old for old in self._entries() if old["step"] < entry["step"]] + [entry]
        write_json(self.folder / INDEX, {"identity": self.identity, "checkpoints": entries[-KEPT:]})
        kept = {old["file"] for old in entries[-KEPT:]}
        discard(*(self.folder / old["file"] for old in entries if old["file"] not in kept))

    def _entries(self) -> list[dict[str, Any]]:
        if not (self.folder / INDEX).exists():
            return []
        index = read_json(self.folder / INDEX)
        if index["identity"] != self.identity:
            raise CheckpointError(
                f"{self.folder} holds checkpoints of another training; --force removes them, "
                "another --run leaves them alone"
            )
        return index["checkpoints"]

    def _agreed_entries(self) -> list[dict[str, Any]]:
        """As rank 0 sees the index."""
        found: list[dict[str, Any]] = []

        def read() -> None:
            found.extend(self._entries())

        self._first(read)
        return json.loads(self.ranks.texts(json.dumps(found))[0])

    def _first(self, work: Callable[[], None]) -> None:
        """Done by rank 0, while the others wait; what it meets is raised on all."""
        met: UserError | None = None
        if self.ranks.first:
            try:
                work()
            except UserError as error:
                met = error
            except (OSError, ValueError) as error:
                met = CheckpointError(f"cannot write below {self.folder}: {error}")
        self.ranks.raise_together(met)

    def _agreed(self, problem: str | None) -> str | None:
        """The first problem that some rank met, the same on all."""
        return next((text for text in self.ranks.texts(problem or "") if text), None)


def _make_empty(folder: Path) -> None:
    for left in folder.parent.glob(".step-*.tmp"):  # by a process that was killed
        discard(left)
    folder.mkdir(parents=True)


def _problem_of_share(path: Path, sha256: str | dict[str, str], ranks: Ranks) -> str | None:
    """What is wrong with the files of a checkpoint that this rank looks at."""
    if isinstance(sha256, str):
        return _problem(path, sha256) if ranks.first else None
    files = sorted(sha256.items())[ranks.rank :: ranks.world]
    return next((found for name, digest in files if (found := _problem(path / name, digest))), None)


def _problem(path: Path, sha256: str | dict[str, str]) -> str | None:
    if isinstance(sha256, dict):
        return _problem_of_share(path, sha256, ALONE)
    if not path.exists():
        return f"the file {path.name} is missing"
    if sha256_file(path) != sha256:
        return "its checksum differs from the one noted when it was written (cut short or edited)"
    return None
