"""`pipeline.plan.footprint`: sizes tell of the numbers of images that they are in proportion to."""

from collections import Counter

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.plan.footprint import PLAIN, TAUGHT, Forms, Images


def largest_prime_factor(n: int) -> int:
    p = 2
    while p * p <= n:
        n, p = (n // p, p) if n % p == 0 and n > p else (n, p + 1)
    return n


@pytest.mark.parametrize("images", [PLAIN, *TAUGHT.values()])
def test_numbers_of_images_are_told_apart_by_what_divides_them(images: Images) -> None:
    """Each of them has a prime factor above 300 (no layer is as wide, times a small number) that no other has."""
    numbers = [n for n in images.units() if n != 2 * images.pool]  # without a lesson, twice the pool is no number
    for number in numbers:
        prime = largest_prime_factor(number)
        assert prime > 300
        assert [n for n in numbers if n % prime == 0] == [number]
    assert len(numbers) == (12 if images.labelled else 6)


def test_sizes_become_forms_that_hold_for_any_numbers() -> None:
    """By hand: 12 bytes for each image that a method of two views joins, 8 for each of a second micro-batch."""
    images = TAUGHT[1]
    forms = Forms(images)
    other = Images(13, 9, labelled=7, lesson_pool=1)
    assert forms.of(12 * (images.labelled + images.pool)) @ other.columns() == 12 * (7 + 13)
    assert forms.of(8 * (images.pool // 2 + 1)) @ other.columns(parts=3) == 8 * 5  # the largest of 13 in three
    assert forms.of(4 * (images.feedback // 2)) @ other.columns(parts=4) == 4 * 3
    assert forms.of(4096) @ other.columns() == 4096
    assert forms.of(0) @ other.columns() == 0


def test_operations_of_both_micro_batches_are_those_of_the_whole() -> None:
    images = TAUGHT[2]
    forms, other = Forms(images), Images(13, 9, labelled=7, lesson_pool=2)
    halves = [n for whole in (images.pool, images.feedback, images.lesson) for n in (whole // 2, whole - whole // 2)]
    total = forms.total(Counter({5 * n: 3 for n in halves}))
    assert total @ other.columns() == 5 * 3 * (13 + 9 + 7 + 2 * 13)
    assert np.array_equal(total @ other.columns(parts=6), total @ other.columns())


def test_accelerators_share_images() -> None:
    images = Images(64, 48, labelled=32, lesson_pool=1)
    assert images.lesson == 96
    assert images.share(8) == Images(8, 6, labelled=4, lesson_pool=1)
    with pytest.raises(UsageError, match=r"must divide every batch, and 64 pool images .* Nearest: 60 or 65"):
        images.share(5)
