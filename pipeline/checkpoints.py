"""Checkpoints of a training run: whole files with checksums, the newest two, loaded without unpickling code."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.files import read_json, sha256_file, whole_file, write_json

KEPT = 2
INDEX = "index.json"


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: made when the first one is saved.
        identity: fingerprint of what is trained; a checkpoint of something else is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write step's checkpoint, then the index, then drop those older than the newest two."""
        path = self.folder / f"step-{step:08d}.pt"
        with whole_file(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # torch's writer reports a full disk this way
                raise OSError(str(error)) from error
        entries = [entry for entry in self._entries() if entry["step"] < step]
        entries.append({"step": step, "file": path.name, "sha256": sha256_file(path)})
        write_json(self.folder / INDEX, {"identity": self.identity, "checkpoints": entries[-KEPT:]})
        for entry in entries[:-KEPT]:
            (self.folder / entry["file"]).unlink(missing_ok=True)

    def newest(self, device: torch.device) -> tuple[int, dict[str, Any], list[str]] | None:
        """(step, state, warnings) of the newest checkpoint that is sound; None where none was ever saved.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged or of another training.
        """
        entries = self._entries()
        warnings: list[str] = []
        for entry in reversed(entries):
            path = self.folder / entry["file"]
            problem = _problem(path, entry["sha256"])
            if problem is None:
                try:
                    state = torch.load(path, map_location=device, weights_only=True)
                    return entry["step"], state, warnings
                except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
                    problem = str(error).splitlines()[0]
            warnings.append(f"checkpoint {path} cannot be used: {problem}")
        if entries:
            raise CheckpointError("\n".join([*warnings, "No sound checkpoint is left; start again with --force"]))
        return None

    def clear(self) -> None:
        """Remove all: the finished network is written, or the stage starts anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

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


def _problem(path: Path, sha256: str) -> str | None:
    if not path.exists():
        return "the file is missing"
    if sha256_file(path) != sha256:
        return "its checksum differs from the one noted when it was written (cut short or edited)"
    return None
