"""Named tensors in a folder that any number of processes writes and any other number reads.

This is torch.distributed.checkpoint: each process writes the parts that it holds, and reads the parts that it
needs. Both of its ways to load pickled code are closed: what describes the tensors is read by an unpickler that knows
nothing but those descriptions, and nothing but tensors is stored.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.serialization import _get_layout

from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError, RunError

DESCRIPTION = ".metadata"
UNDERSTOOD = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def write_shards(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write the tensors, of each rank what it holds of them; all ranks call it.

    Raises:
        RunError: some rank could not write.
    """
    try:
        with _quiet():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(folder),
                process_group=ranks.group,
                no_dist=ranks.world == 1,
            )
    except (dcp.CheckpointException, OSError) as error:
        raise RunError(
            f"cannot write the checkpoint {folder}: {_first_line(error)}. All processes must see this folder (a "
            "shared file system, with several nodes) and find room in it; the last checkpoint is intact"
        ) from error


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in the folder, by name.

    Raises:
        CheckpointError: what describes them is missing, damaged, or holds more than tensors.
    """
    tensors = {}
    for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder} holds {name}, which is not a tensor; it was written by something else")
        tensors[name] = (entry.size, entry.properties.dtype)
    return tensors


def read_shards(folder: Path, into: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors in place, of each rank what it holds of them; all ranks call it.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor has another shape.
    """
    try:
        with _quiet():
            dcp.load(into, storage_reader=_Reader(folder), process_group=ranks.group, no_dist=ranks.world == 1)
    except (dcp.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that a single process is a single process, and about its own use of storages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.8
        yield


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / DESCRIPTION
        try:
            with path.open("rb") as file:
                metadata = _Descriptions(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata) or any(
            isinstance(entry, BytesStorageMetadata) for entry in metadata.state_dict_metadata.values()
        ):
            raise CheckpointError(f"{path} describes more than tensors; it was written by something else")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Descriptions(pickle.Unpickler):
    """Builds descriptions of tensors, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath  # the folder's name when it was written; not used
        if name in UNDERSTOOD.get(module, ()):
            return _get_layout if name == "_get_layout" else super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


def _first_line(error: BaseException) -> str:
    """What went wrong on whichever rank, without the traceback that torch puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
