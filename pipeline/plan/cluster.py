"""The cluster that a plan is for, and accelerators known by name."""

import difflib
from dataclasses import dataclass

from pipeline.errors import UsageError


@dataclass(frozen=True)
class Accelerator:
    """Public figures of one accelerator; memory in GiB, links in GB/s one way, rates in FLOP/s without sparsity."""

    memory: float
    float32: float | None
    bf16: float
    bandwidth: float
    between_nodes: float
    source: str


NVIDIA = "NVIDIA data sheet; between nodes: one network card of the DGX for each GPU"
ACCELERATORS = {
    "a100-40gb": Accelerator(40, 19.5e12, 312e12, 300, 25, NVIDIA),
    "a100-80gb": Accelerator(80, 19.5e12, 312e12, 300, 25, NVIDIA),
    "h100-80gb": Accelerator(80, 67e12, 989e12, 450, 50, NVIDIA),
    "tpu-v3-core": Accelerator(  # half a chip; 340 TB/s of all-reduce in a pod of 2,048 cores
        16, None, 61.5e12, 166, 166, "cloud.google.com/tpu/docs/v3"
    ),
}


def accelerator(name: str) -> Accelerator:
    """One by its name.

    Raises:
        UsageError: it is not known.
    """
    if name not in ACCELERATORS:
        close = difflib.get_close_matches(name, ACCELERATORS, n=1)
        raise UsageError(
            f"no accelerator {name!r} is known{f'; did you mean {close[0]}?' if close else '.'} "
            f"There are: {', '.join(ACCELERATORS)}; or give --memory, --flops and --bandwidth"
        )
    return ACCELERATORS[name]


@dataclass(frozen=True)
class Cluster:
    """Accelerators that train together.

    Attributes:
        accelerators: number.
        per_node: of them in one node.
        memory: of one accelerator, bytes.
        flops: of one accelerator, FLOP/s that the data sheet promises.
        efficiency: share of them that training reaches.
        bandwidth: bytes/s that an accelerator sends within its node.
        between_nodes: bytes/s that it sends to another node.
        headroom: share of the memory that is left free: the framework, kernels' workspace, fragmentation.

    Raises:
        UsageError: a figure is impossible.
    """

    accelerators: int
    per_node: int
    memory: float
    flops: float
    efficiency: float
    bandwidth: float
    between_nodes: float
    headroom: float = 0.1

    def __post_init__(self) -> None:
        if self.accelerators < 1 or self.per_node < 1:
            raise UsageError(f"--accelerators {self.accelerators} and --per-node {self.per_node} must be at least 1")
        if self.accelerators > self.per_node and self.accelerators % self.per_node:
            raise UsageError(
                f"--per-node (={self.per_node}) must divide --accelerators (={self.accelerators}): nodes are alike"
            )
        for name in ("memory", "flops", "efficiency", "bandwidth", "between_nodes"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name):g}")
        if not 0 <= self.headroom < 1 or self.efficiency > 1:
            raise UsageError(
                f"--headroom (={self.headroom:g}) and --efficiency (={self.efficiency:g}) are shares of the whole, "
                "from 0 to 1"
            )

    @property
    def usable(self) -> float:
        """Bytes of one accelerator that tensors may fill."""
        return self.memory * (1 - self.headroom)

    def link(self, first: int, stride: int = 1) -> float:
        """Bytes/s of the slowest link in a ring of `first` accelerators, `stride` apart."""
        return self.bandwidth if first * stride <= self.per_node else min(self.bandwidth, self.between_nodes)

    def gather_seconds(self, size: float, members: int, stride: int = 1) -> float:
        """All-gather or reduce-scatter of `size` bytes in all, in a ring."""
        return (members - 1) / members * size / self.link(members, stride)

    def all_reduce_seconds(self, size: float, members: int, stride: int = 1) -> float:
        """All-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather_seconds(size, members, stride)
