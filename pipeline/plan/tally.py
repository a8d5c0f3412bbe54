"""What a computation allocates and calculates: every piece of memory, from when to when, and every operation.

On fake tensors (shapes and types alone) a computation costs no memory and hardly any time, and this tells which tensors
a real one would hold at every moment. What a program asks of their values is answered as in an ordinary step.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten

# Answers to `float(x)` and `if x` on tensors without data, by the operation that made x; 1 or True where it is none of
# these. So losses and norms are finite and not zero, gradients are clipped, and a replay reproduces what was recorded.
ANSWERS: dict[Any, bool | float] = {aten.eq: False, aten.ge: False, aten.max: 0.0}

# In place, so that nothing begins or ends: on fake tensors nothing at all happens. A fifth of the time of a step.
CHANGE_VALUES = {
    *(aten.add_.Tensor, aten.mul_.Tensor, aten.sub_.Tensor, aten.div_.Tensor, aten.copy_.default, aten.zero_.default),
    *(aten.addcmul_.default, aten.addcdiv_.default, aten.sqrt_.default, aten.rsqrt_.default, aten.lerp_.Scalar),
}


@dataclass(slots=True)
class Piece:
    """Memory of one tensor and its views.

    Attributes:
        size: bytes.
        shape, dtype: of the tensor that it was allocated for.
        first, last: it lives at the events first ≤ e < last; each allocation is an event.
        kind: (what it was labelled as, whether shards of a network divide it), or None.
    """

    size: int
    shape: torch.Size
    dtype: torch.dtype
    first: int
    last: int | None = None
    kind: "tuple[str, bool] | None" = None


class Tally(TorchDispatchMode):
    """Within this context: memory of the tensors that begin here, and floating-point operations.

    A multiplication and an addition are two operations; elementwise operations count as none, as is usual. Memory
    that a kernel uses inside itself is not seen.

    Attributes:
        pieces: in the order of their allocation.
        flops: of each call of an operator that has any → how many such calls.
        marks: (event, name) of each phase that began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[Piece] = []
        self.flops: Counter[int] = Counter()
        self.marks: list[tuple[int, str]] = []
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, Piece | None] = weakref.WeakKeyDictionary()
        self._origin: weakref.WeakKeyDictionary[torch.UntypedStorage, Any] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls on fake tensors
            return args[0].fake_device
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._answer(args[0])
        if func is aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = args[0], [_all_rows(index) for index in args[1]]
        if func in CHANGE_VALUES and isinstance(args[0], FakeTensor):
            return args[0]
        out = func(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = None if _aliases(func) else self._begin(tensor, storage)
                if tensor.ndim == 0:
                    self._origin[storage] = func.overloadpacket
        if count := operations(func, args, kwargs, out):
            self.flops[count] += 1
        return out

    @property
    def events(self) -> int:
        """How many there have been."""
        return len(self.pieces)

    @property
    def peak(self) -> int:
        """Most bytes that lived at a time."""
        return int(trace(self.pieces, [piece.size for piece in self.pieces], self.events).max(initial=0))

    def mark(self, phase: str) -> None:
        """A phase begins, if it is not that one already."""
        if not self.marks or self.marks[-1][1] != phase:
            self.marks.append((self.events, phase))

    def label(self, kind: str, tensors: Iterable[Tensor], *, divided: bool = False) -> None:
        """Say what the memory of these tensors is for, and whether shards of a network divide it."""
        for tensor in tensors:
            piece = self._known.get(tensor.untyped_storage())
            if piece is not None:
                piece.kind = kind, divided

    def _begin(self, tensor: Tensor, storage: torch.UntypedStorage) -> Piece:
        piece = Piece(storage.nbytes(), tensor.shape, tensor.dtype, self.events)
        self.pieces.append(piece)
        weakref.finalize(storage, self._end, piece).atexit = False
        return piece

    def _end(self, piece: Piece) -> None:
        piece.last = self.events

    def _answer(self, scalar: Tensor) -> Any:
        answer = ANSWERS.get(self._origin.get(scalar.untyped_storage()), True)
        return answer if scalar.dtype == torch.bool else float(answer) if scalar.is_floating_point() else int(answer)


def trace(pieces: Sequence[Piece], sizes: Any, events: int) -> np.ndarray:
    """Sizes that live at each of so many events, (E, …), of pieces with these sizes, (P, …)."""
    sizes = np.asarray(sizes, dtype=np.float64)
    change = np.zeros((events + 1, *sizes.shape[1:]))
    np.add.at(change, [piece.first for piece in pieces], sizes)
    np.add.at(change, [events if piece.last is None else piece.last for piece in pieces], -sizes)
    return change.cumsum(axis=0)[:events]


@cache
def _aliases(func: Any) -> bool:
    """Whether an operator may return a tensor that it was given, or a view of it."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _all_rows(index: Tensor | None) -> Tensor | None:
    """Where a mask of unknown content chooses rows: as if it chose as many as it has."""
    if index is None or index.dtype != torch.bool:
        return index
    return torch.empty(index.numel(), dtype=torch.int64)


IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # torch counts the others alone


def operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one call of an operator."""
    packet = getattr(func, "overloadpacket", func)
    packet = IN_PLACE.get(packet, packet)
    if packet == aten.convolution_backward:  # torch's own formula forgets groups: 14 times too many for a B0
        gradient, images, weight = args[0], args[1], args[2]
        transposed, wanted = bool(args[7]), args[10]
        return sum(wanted[:2]) * conv_flop_count(images.shape, weight.shape, gradient.shape, transposed)
    if packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))
