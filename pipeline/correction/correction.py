"""What a teacher's distributions say of the data set's classes: an identity, a map of classes, or a fit."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from pipeline.correction.class_map import UNMAPPED, ClassMap
from pipeline.errors import DataError
from pipeline.log_odds import distributions, log_odds, log_odds_of_shares
from pipeline.storage.files import Location, fingerprint, opened, whole_file

Kind = Literal["identity", "map", "scaling", "fit", "prior-em", "prior-bbse"]
CORRECTION_FILE = "correction.safetensors"
FLOOR = 1e-5  # of a probability of which the logarithm is taken, over C_T; below it a teacher's numbers are noise
TINY = 1e-45  # of a probability that is only weighed: float32 has none between it and 0
START_FLOOR = 0.1  # share of the start that is uniform, as the calibrator's
FORMAT = "mpl-correction"
PARTS = ("class_map", "weight", "bias")
NEEDED: dict[Kind, set[str]] = {  # parts of each kind
    "identity": set(),
    "map": {"class_map"},
    "scaling": {"bias"},
    "prior-em": {"bias"},
    "prior-bbse": {"bias"},
    "fit": {"weight", "bias"},
}
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Correction:
    """C_T → C. Rows go in as distributions over the teacher's classes.

    A map sums what it maps; what is mapped to nothing is told of no class: in `log_odds` it counts against all of
    them, in `targets` it is spread evenly. A fit is softmax(a·log(0.9·q₀ + 0.1/C) + log(q)·W + b), with q₀ the targets
    of the map or the identity, or uniform where there is neither; a scaling is the same without W. Of prior shift
    (`prior-em`, `prior-bbse`) it is softmax(log q₀ + b), which changes nothing where b is zero.

    Attributes:
        kind: see above.
        teacher_names: of the C_T classes.
        class_names: of the C.
        class_map: (C_T,), see `ClassMap`; None: there is none, and unless the classes are equal none is a start.
        weight: of a fit, (C_T, C), float64.
        bias: of a fit, a scaling or prior shift, (C,), float64.
        scale: likewise, a.
    """

    kind: Kind
    teacher_names: tuple[str, ...]
    class_names: tuple[str, ...]
    class_map: ClassMap | None = None
    weight: NDArray[np.float64] | None = None
    bias: NDArray[np.float64] | None = None
    scale: float = 1.0

    @classmethod
    def identity(cls, names: tuple[str, ...]) -> "Correction":
        """Of a teacher that has the data set's classes."""
        return cls("identity", names, names)

    @classmethod
    def mapped(cls, teacher_names: tuple[str, ...], names: tuple[str, ...], class_map: ClassMap) -> "Correction":
        """By a map alone."""
        return cls("map", teacher_names, names, class_map)

    @property
    def classes_are_equal(self) -> bool:
        """Whether the teacher has the data set's classes in their order."""
        return self.teacher_names == self.class_names

    def targets(self, q: Floats) -> NDArray[np.float32]:
        """Distributions over the data set's classes, float32 (n, C), of distributions (n, C_T); rows sum to 1."""
        if self.kind == "identity":
            return q.astype(np.float32, copy=False)
        if self.kind == "map":
            return self._start(q).astype(np.float32)
        z = self._logits(q)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        result: NDArray[np.float32] = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
        return result

    def log_odds(self, stored: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-odds of the data set's classes, (n, C), from those of the teacher's, (n, C_T), nats."""
        if self.kind == "identity":
            return stored
        q = distributions(stored)
        if self.kind == "map":
            shares, rest = self._shares(q)
            return log_odds_of_shares(np.concatenate([shares, rest], axis=1))[:, : len(self.class_names)]
        return log_odds(torch.from_numpy(self._logits(q))).numpy()

    def fingerprint(self) -> str | None:
        """Of all that it does; None for the identity, which does nothing."""
        if self.kind == "identity":
            return None
        arrays = [None if a is None else a.tolist() for a in (self.class_map, self.weight, self.bias)]
        return fingerprint([self.kind, list(self.teacher_names), list(self.class_names), arrays, self.scale])

    def save(self, path: Location) -> None:
        """Write it, whole or not at all."""
        arrays = {"class_map": self.class_map, "weight": self.weight, "bias": self.bias}
        names = {"teacher_names": list(self.teacher_names), "class_names": list(self.class_names)}
        header = {"format": FORMAT, "version": "1", "kind": self.kind, "scale": repr(self.scale)}
        with whole_file(path) as temporary:
            tensors = {name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None}
            save_file(tensors, temporary, header | {k: json.dumps(v, ensure_ascii=False) for k, v in names.items()})

    def _shares(self, q: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, C) of each class, and (n, 1) of what is mapped to none."""
        assert self.class_map is not None
        columns = np.zeros((len(self.teacher_names), len(self.class_names) + 1))
        columns[np.arange(len(columns)), self.class_map] = 1.0  # UNMAPPED is the last column
        shares = q.astype(np.float64) @ columns
        return shares[:, :-1], shares[:, -1:]

    def _start(self, q: Floats) -> NDArray[np.float64]:
        """(n, C): q₀."""
        classes = len(self.class_names)
        if self.class_map is not None:
            shares, rest = self._shares(q)
            result: NDArray[np.float64] = shares + rest / classes
            return result / result.sum(axis=1, keepdims=True)
        return q.astype(np.float64) if self.classes_are_equal else np.full((len(q), classes), 1.0 / classes)

    def _logits(self, q: Floats) -> NDArray[np.float64]:
        assert self.bias is not None
        if self.kind in ("prior-em", "prior-bbse"):
            result: NDArray[np.float64] = np.log(np.maximum(self._start(q), TINY)) + self.bias
            return result
        scaled = self.scale * start_logits(self._start(q)) + self.bias
        return scaled if self.weight is None else scaled + features(q) @ self.weight


def features(q: Floats) -> NDArray[np.float64]:
    """What a fit sees of distributions (n, C_T): their logarithms, bounded below, (n, C_T)."""
    result: NDArray[np.float64] = np.log(np.maximum(q.astype(np.float64), FLOOR / q.shape[1]))
    return result


def start_logits(q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a fit starts, (n, C), from q₀ (n, C)."""
    result: NDArray[np.float64] = np.log((1 - START_FLOOR) * q + START_FLOOR / q.shape[1])
    return result


def load_correction(path: Location) -> Correction:
    """Read one.

    Raises:
        DataError: it is missing, damaged, or of another version.
    """
    try:
        return _load(path)
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); run mpl filter again") from error


def _load(path: Location) -> Correction:
    with opened(path) as file:
        data = file.read()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])["__metadata__"]
    if (header["format"], header["version"]) != (FORMAT, "1"):
        raise ValueError(f"it is {header['format']} version {header['version']}")
    arrays = load(data)
    theirs, ours = (tuple(json.loads(header[name])) for name in ("teacher_names", "class_names"))
    held = {name: arrays[name] for name in PARTS if name in arrays}
    found = Correction(header["kind"], theirs, ours, **held, scale=float(header["scale"]))
    shapes = {"class_map": (len(theirs),), "weight": (len(theirs), len(ours)), "bias": (len(ours),)}
    needed = NEEDED[found.kind]
    if needed - arrays.keys() or any(arrays[name].shape != shapes[name] for name in arrays):
        raise ValueError("its arrays do not fit its classes")
    if found.class_map is not None and not ((found.class_map >= UNMAPPED) & (found.class_map < len(ours))).all():
        raise ValueError("its map names a class that there is not")
    return found
