"""Seeds are stable for ever: runs and stored partitions depend on them."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.seeds import derive_seed, permutation


def test_derive_seed_is_the_sha256_of_its_arguments() -> None:
    digest = hashlib.sha256(b'[3, "augment", 12]').hexdigest()
    assert derive_seed(3, "augment", 12) == int(digest[:16], 16) // 2


def test_stored_orders_stay_what_they_were() -> None:
    """Values written down once; a new NumPy that changed them would change every partition."""
    assert permutation(8, 0, "order").tolist() == [2, 0, 7, 4, 6, 1, 5, 3]
    assert derive_seed(0) == 7520536977032167579


@given(st.integers(0, 2**31), st.text(max_size=5), st.text(max_size=5), st.integers(0, 9))
def test_purposes_do_not_collide(seed: int, a: str, b: str, step: int) -> None:
    assert 0 <= derive_seed(seed, a, step) < 2**63
    assert (derive_seed(seed, a, step) == derive_seed(seed, b, step)) == (a == b)
    assert derive_seed(seed, a, step) != derive_seed(seed, a, str(step))
    assert derive_seed(seed, a + b) != derive_seed(seed, a, b)


@given(st.integers(0, 300), st.integers(0, 99))
def test_permutation_holds_every_number_once(n: int, seed: int) -> None:
    order = permutation(n, seed, "x")
    assert order.dtype == np.int64
    assert sorted(order) == list(range(n))
