"""Seeds and orders derived from (seed, purpose, …): the same on every machine and in every version."""

import hashlib
import json

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of the seeds of all other purposes.

    `derive_seed(0, "augment", 12)` and `derive_seed(0, "dropout", 12)` have nothing in common; the
    value depends on nothing but the arguments (SHA-256 of them), so it may be stored and compared.
    """
    text = json.dumps([int(seed), *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def random_stream(seed: int, *purpose: str | int) -> np.random.RandomState:
    """Random numbers for one purpose; `RandomState`, since NumPy froze its stream (NEP 19), not `Generator`'s."""
    derived = derive_seed(seed, *purpose)
    return np.random.RandomState([derived & 0xFFFFFFFF, derived >> 32])


def permutation(n: int, seed: int, *purpose: str | int) -> np.ndarray:
    """A random order of range(n), int64 (n,), a pure function of its arguments."""
    return random_stream(seed, *purpose).permutation(n).astype(np.int64, copy=False)
