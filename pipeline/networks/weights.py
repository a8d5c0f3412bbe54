"""Files of weights as people have them: what is saved in them, and which of it are a network's.

Nothing in a file is run: `torch.load` with `weights_only=True`.
"""

import argparse
import pickle
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pipeline.errors import CheckpointError

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
STATES = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net", "weights")
"""Where a checkpoint keeps its weights. Averaged ones come first, as timm takes them."""
COUNTERS = frozenset({"n_averaged"})  # what torch's AveragedModel keeps beside the weights
SCALAR = np.float64(0).__reduce__()[0]  # makes a number of numpy's again
HARMLESS: list[Any] = [  # what training scripts save beside weights: no code comes with it
    argparse.Namespace,
    np.dtype,
    *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        tensors: weights and buffers by name, as saved.
        place: the key that they lay under, "" for the file's top level.
        beside: what else is there, by key.
    """

    tensors: dict[str, Tensor]
    place: str = ""
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str | None:
        """What the training script called the network: `arch`, or `model` of its arguments."""
        for stated in (self.beside.get("arch"), self.argument("model"), self.argument("arch")):
            if isinstance(stated, str):
                return stated
        return None

    @property
    def class_names(self) -> list[str] | None:
        """The names in the order of the outputs, where the file has them."""
        for key in ("class_names", "classes", "label_names"):
            if isinstance(names := self.beside.get(key), list | tuple) and names:
                return [str(name) for name in names]
        numbers = self.beside.get("class_to_idx")
        if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))) and numbers:
            return [str(name) for name in sorted(numbers, key=lambda name: int(numbers[name]))]
        return None

    def argument(self, name: str) -> Any:
        """An argument of the training script, None if it is not told."""
        arguments = self.beside.get("args", self.beside.get("hyper_parameters", {}))
        return arguments.get(name) if isinstance(arguments, Mapping) else getattr(arguments, name, None)


def read_weights(path: Path) -> Saved:
    """What a file of weights holds: safetensors, or what `torch.save` wrote.

    Raises:
        CheckpointError: it is missing or damaged, holds no weights, or what only code from the file could rebuild.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    with path.open("rb") as file:
        begin = file.read(9)
    try:
        if len(begin) == 9 and begin[8:] == b"{":  # safetensors: a length of 8 bytes, then JSON
            return Saved(load_file(path))
        with warnings.catch_warnings(), safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of TorchScript
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path)) from error
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises a dozen kinds on damaged bytes
        said = str(error).partition("\n")[0] or type(error).__name__
        if "TorchScript" in said:
            raise CheckpointError(
                f'{path} is TorchScript, which is code. Keep its weights alone: python -c "import torch; torch.save('
                f"torch.jit.load('{path.name}', 'cpu').state_dict(), 'weights.pth')\""
            ) from error
        raise CheckpointError(f"{path} is cut short or no file of weights: {said}") from error
    return _found(held, path)


def _found(held: Any, path: Path) -> Saved:
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, where weights by name are expected")
    if _is_state(held):
        return Saved(dict(held))
    for key in STATES:
        if isinstance(state := held.get(key), Mapping) and _is_state(state):
            beside = {str(other): value for other, value in held.items() if other not in STATES}
            return Saved({name: value for name, value in state.items() if isinstance(value, Tensor)}, key, beside)
    raise CheckpointError(
        f"{path} holds {', '.join(map(str, list(held)[:6])) or 'nothing'}: no weights under any of {', '.join(STATES)}"
    )


def _is_state(held: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.ndim for value in held.values()) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name in COUNTERS) for name, value in held.items()
    )


def _refusal(path: Path) -> str:
    try:
        foreign = [
            name for name in get_unsafe_globals_in_checkpoint(path) if not name.startswith(("numpy.", "argparse."))
        ]
    except Exception:  # not of the zipped kind, or damaged: nothing can be named
        foreign = []
    what = f"objects ({', '.join(foreign[:3])})" if foreign else "objects"
    return (
        f"{path} holds {what} that can only be rebuilt by running code from the file, which is not done. If you trust "
        'it, keep the weights alone, with what it was made by at hand: python -c "import torch; c = torch.load('
        f"'{path.name}', 'cpu', weights_only=False); c = c if hasattr(c, 'state_dict') else c.get('state_dict', "
        "c.get('model', c)); torch.save(c.state_dict() if hasattr(c, 'state_dict') else dict(c), 'weights.pth')\""
    )


def fitted(saved: Saved, model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors under the model's own names: without `module.`, `_orig_mod.` and other wrappers' prefixes.

    Raises:
        CheckpointError: they are another network's, or two networks' of this kind.
    """
    expected = model.state_dict()
    tensors = {name: tensor for name, tensor in saved.tensors.items() if name not in COUNTERS}
    if not _prefixes(tensors, expected):
        tensors = _renamed_by_timm(tensors, model) or tensors
    prefixes = _prefixes(tensors, expected)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds {len(prefixes)} networks of this kind, under {', '.join(map(repr, prefixes))}; save the "
            "weights of one"
        )
    if not prefixes:
        shared = _likeliest(tensors, expected)
        here = {name.removeprefix(shared) for name in tensors if name.startswith(shared)}
        lacks, more = sorted(set(expected) - here), sorted(here - set(expected))
        raise CheckpointError(
            f"{path} holds the weights of another network: {len(lacks)} of {len(expected)} tensors are missing"
            + (f" (such as {lacks[0]})" if lacks else "")
            + (f", {len(more)} are unknown (such as {more[0]})" if more else "")
            + ". Name its architecture: --architecture NAME, timm's, or torchvision_NAME"
        )
    own = {name.removeprefix(prefixes[0]): value for name, value in tensors.items() if name.startswith(prefixes[0])}
    for name, value in expected.items():
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(own[name].shape)}, and {tuple(value.shape)} in the network that was named"
            )
    return {name: own[name] for name in expected}


def _prefixes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Those under which the file has exactly the model's tensors."""
    last = list(expected)[-1]
    candidates = [name[: -len(last)] for name in tensors if name == last or name.endswith(f".{last}")]
    return [
        prefix
        for prefix in candidates
        if {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)} == set(expected)
    ]


def _likeliest(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The prefix under which most of the model's names are."""
    parts = next(iter(tensors)).split(".")[:-1]
    prefixes = ["", *(".".join(parts[: i + 1]) + "." for i in range(len(parts)))]
    return max(prefixes, key=lambda prefix: sum(name.removeprefix(prefix) in expected for name in tensors))


def _renamed_by_timm(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """As timm renames the original authors' weights of some families; None where it does not know them."""
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(rename(dict(tensors), model)) if rename else None
    except Exception:  # it expects its own family's file
        return None
