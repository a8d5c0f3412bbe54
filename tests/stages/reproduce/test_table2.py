"""`mpl reproduce table2`: its methods, and the paper's figures. A small one runs in tests/stages/test_chain.py."""

from pathlib import Path

import pytest

from pipeline.batches import mixture
from stages.options import Context, Options, changed, make_context
from stages.reproduce.table2 import NOISY, NOISY_SAME, REDUCED, SUPERVISED, paper_figure, variants
from tests.stages.reproduce.comparisons import tiny_context


def context_with(folder: Path, *changes: str) -> Context:
    recipe = changed(tiny_context(folder).recipe.model_dump(mode="json"), changes, "tiny")
    return make_context(Options(folder / "run"), parsed=recipe)


@pytest.mark.parametrize("data", ["auto", "pool", "pool+labelled"])
@pytest.mark.parametrize("target", ["auto", "label", "teacher"])
def test_the_second_noisystudent_sees_what_reduced_mpl_sees(tmp_path: Path, data: str, target: str) -> None:
    """It is there where the paper's NoisyStudent sees something else."""
    changes = (f"train_reduced.student_data={data}", f"train_reduced.labelled_target={target}")
    context = context_with(tmp_path, *changes)
    tree = context.recipe.model_dump(mode="json")
    found = {variant.name: changed(tree, variant.changes, "tiny").train_reduced for variant in variants(context)}
    own, paper = mixture(context.recipe.train_reduced, "calibrator"), mixture(found[NOISY], "fixed")
    assert paper.labelled
    assert paper.true_labels
    if own == paper:
        assert list(found) == [SUPERVISED, NOISY, REDUCED]
    else:
        assert list(found) == [SUPERVISED, NOISY, NOISY_SAME, REDUCED]
        assert mixture(found[NOISY_SAME], "fixed") == own
    assert [settings.teacher for settings in found.values()][-1] == "calibrator"
    assert (own == paper) == (data == "pool+labelled" and target != "teacher")


def test_the_papers_figures(tmp_path: Path) -> None:
    """arXiv:2003.10580v1, table 2."""
    context = context_with(tmp_path, "data.manifest=svhn")
    assert paper_figure(context, SUPERVISED) == "98.17 ± 0.03"
    assert paper_figure(context, NOISY) == "98.71 ± 0.11"
    assert paper_figure(context, NOISY_SAME) == "–"
    assert paper_figure(context, REDUCED) == "98.78 ± 0.07"
