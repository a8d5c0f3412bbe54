"""Checkpoints of a training run: whole files with checksums, the newest two, loaded without unpickling code.

A single process writes one file per checkpoint; several processes write one folder, each of them what it holds.
Either is read by any number of processes.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.distributed.layouts import bare
from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.distributed.sharded import placed_like, reshard
from pipeline.errors import CheckpointError, UserError
from pipeline.storage.files import discard, read_json, sha256_file, sync_folder, whole_file, write_json

Networks = Mapping[str, tuple[nn.Module, Optimizer | None]]  # by a label that is kept with the checkpoint
Shapes = dict[str, tuple[torch.Size, torch.dtype]]

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
        sums = {
            name: digest for text in self.ranks.texts(json.dumps(mine)) for name, digest in json.loads(text).items()
        }

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
        stored: dict[str, Tensor] = state["tensors"]
        with restoring(networks, {name: (t.shape, t.dtype) for name, t in stored.items()}) as tensors, torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(placed_like(stored[name], tensor))
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
        entries: list[dict[str, Any]] = []

        def read() -> None:
            entries.extend(self._entries())

        self._first(read)
        return json.loads(self.ranks.texts(json.dumps(entries))[0])

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


def identity_of(folder: Path) -> str | None:
    """Fingerprint of the training that the checkpoints in a folder are of; None where there are none."""
    path = folder / INDEX
    return str(read_json(path)["identity"]) if path.exists() else None


def _make_empty(folder: Path) -> None:
    for left in folder.parent.glob(".step-*.tmp"):  # by a process that was killed
        discard(left)
    folder.mkdir(parents=True)


def _problem_of_share(path: Path, sha256: str | dict[str, str], ranks: Ranks) -> str | None:
    """What is wrong with the files of a checkpoint that this rank looks at."""
    if isinstance(sha256, str):
        return _problem(path, sha256) if ranks.first else None
    files = sorted(sha256.items())[ranks.rank :: ranks.world]
    return next((problem for name, digest in files if (problem := _problem(path / name, digest))), None)


def _problem(path: Path, sha256: str | dict[str, str]) -> str | None:
    if isinstance(sha256, dict):
        return _problem_of_share(path, sha256, ALONE)
    if not path.exists():
        return f"the file {path.name} is missing"
    if sha256_file(path) != sha256:
        return "its checksum differs from the one noted when it was written (cut short or edited)"
    return None


# --- the tensors of networks and optimisers by name, whatever their layout --------------------------------------


def tensors_of(networks: Networks) -> dict[str, Tensor]:
    """All tensors of networks and optimisers by name; each process's view of a sharded one.

    Parameters and buffers are `label/network/NAME`, an optimiser's are `label/optimizer/NAME/KEY` with the name of
    the parameter: they do not depend on the layout, or on how the optimiser groups them. Its settings are not kept.
    """
    tensors: dict[str, Tensor] = {}
    for label, (model, optimizer) in networks.items():
        network = bare(model)
        reshard(network)
        tensors |= {f"{label}/network/{name}": t.detach() for name, t in network.state_dict().items()}
        if optimizer is not None:
            tensors |= {
                f"{label}/optimizer/{name}/{key}": torch.as_tensor(value)
                for name, p in network.named_parameters()
                for key, value in optimizer.state.get(p, {}).items()
                if value is not None
            }
    return tensors


@contextmanager
def restoring(networks: Networks, stored: Shapes) -> Iterator[dict[str, Tensor]]:
    """Tensors to be filled with what is stored: the networks' own, and new ones for the optimisers.

    On a clean exit the new ones become the optimisers' state; before it, that is as it was.

    Raises:
        CheckpointError: names or shapes differ from what is stored.
    """
    into: dict[str, Tensor] = {}
    new: list[tuple[Optimizer, Tensor, str, Tensor]] = []
    for label, (model, optimizer) in networks.items():
        network = bare(model)
        reshard(network)
        into |= {f"{label}/network/{name}": t.detach() for name, t in network.state_dict().items()}
        if optimizer is not None:
            for name, p in network.named_parameters():
                prefix = f"{label}/optimizer/{name}/"
                for full in (n for n in stored if n.startswith(prefix)):
                    shape, dtype = stored[full]
                    if shape == p.shape:
                        into[full] = torch.empty_like(p.detach(), dtype=dtype)
                    else:  # a count of steps, say
                        into[full] = torch.empty(shape, dtype=dtype)
                    new.append((optimizer, p, full.removeprefix(prefix), into[full]))
    _check_names(into, stored)
    yield into
    for _, optimizer in networks.values():
        if optimizer is not None:
            optimizer.state.clear()
    for owner, parameter, key, tensor in new:
        owner.state[parameter][key] = tensor


def _check_names(into: dict[str, Tensor], stored: Shapes) -> None:
    wrong = sorted(into.keys() ^ stored.keys()) or [name for name, t in into.items() if t.shape != stored[name][0]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"it is of another network or optimiser: {', '.join(wrong[:3])}{more} differ; train with the model and "
            "the optimiser that it was saved with, or start again with --force"
        )
