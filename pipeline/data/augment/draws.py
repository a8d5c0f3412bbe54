"""Random numbers for a batch of which this process may hold a slice only."""

import torch
from torch import Tensor

from pipeline.seeds import derive_seed


class Draws:
    """One stream of random numbers for each purpose, drawn on the CPU for the whole batch.

    Args:
        seed: of the batch.
        total: images in the whole batch.
        first: place in it of the first image that this process holds …
        count: … and the number that it holds (B).
    """

    def __init__(self, seed: int, total: int, first: int, count: int) -> None:
        assert 0 <= first <= total - count, (first, count, total)
        self.seed, self.total, self.rows = seed, total, slice(first, first + count)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 (B, *shape)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose))
        return torch.rand((self.total, *shape), generator=generator)[self.rows]

    def signed(self, purpose: str, *shape: int) -> Tensor:
        """Uniform in [−1, 1), float32 (B, *shape)."""
        return 2 * self.uniform(purpose, *shape) - 1

    def coin(self, purpose: str, probability: float = 0.5) -> Tensor:
        """True with this probability, bool (B,)."""
        return self.uniform(purpose) < probability

    def integer(self, purpose: str, below: int, *shape: int) -> Tensor:
        """Uniform in 0 … below − 1, int64 (B, *shape)."""
        # The product can round up to `below` itself when `below` is not a power of two.
        return (self.uniform(purpose, *shape) * below).long().clamp(max=below - 1)
