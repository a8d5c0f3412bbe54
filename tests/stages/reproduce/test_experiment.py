"""What an experiment says that its seeds change."""

from pathlib import Path

import pytest

from stages.console import Console
from stages.options import Options, make_context
from stages.reproduce.experiment import what_seeds_change


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("digits", "draws its own 50 labelled images, stratified by class, and the pool has the others"),
        ("cifar10-small", "draws its own 4,000 labelled images, stratified by class; the pool is the same"),
        ("cifar10-4000", "draws its own 4,000 labelled images, stratified by class, and the pool has the others"),
    ],
)
def test_seeds_draw_labels_where_recipe_or_manifest_draws_them(tmp_path: Path, recipe: str, words: str) -> None:
    context = make_context(Options(tmp_path / "run", recipe, device="cpu"), console=Console(quiet=True))
    assert words in what_seeds_change(context)


def test_seeds_leave_labels_that_are_all_used(tmp_path: Path) -> None:
    options = Options(tmp_path / "run", "digits", ("data.manifest=digits",), device="cpu")
    words = what_seeds_change(make_context(options, console=Console(quiet=True)))
    assert "labels, pool and test images are the same" in words
