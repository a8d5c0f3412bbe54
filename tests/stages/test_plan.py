"""`mpl plan` as a person meets it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.errors import UsageError
from stages.plan import command
from tests.plan import trainings  # noqa: F401  a small network

NETWORK = ("--set", "train_reduced.model.name=three_blocks", "--set", "train_mpl.model.name=three_blocks")
DIGITS = ("--memory", "1", "--flops", "1e11")


def mpl_plan(*arguments: str) -> Result:
    return CliRunner().invoke(command, [*NETWORK, *arguments])


def test_prints_one_object_that_adds_up_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(mpl_plan("--json", "--method", "mpl-hard", *DIGITS).stdout.splitlines()[-1])
    chosen = found["methods"]["mpl-hard"]["chosen"]
    assert chosen["layout"] == "one accelerator"
    assert sum(chosen["memory"].values()) == chosen["bytes"] == max(chosen["phases"].values())
    assert chosen["compute_seconds"] == chosen["flops"] / (1e11 * 0.4)
    assert not list(tmp_path.iterdir())


def test_the_manifest_tells_how_many_labelled_images_there_are() -> None:
    """digits has 50; the recipe may take fewer; eight processes take a multiple of eight."""
    asked = ("--method", "reduced", *DIGITS)
    assert "50 labelled ones for feedback" in mpl_plan(*asked).stdout
    assert "20 labelled ones for feedback" in mpl_plan(*asked, "--set", "data.labelled=20").stdout
    assert "48 labelled ones for feedback" in mpl_plan(*asked, "--accelerators", "8").stdout


@pytest.mark.long  # the same of one plan: tests/plan/test_choose.py
def test_tells_every_method_and_what_is_missing_where_nothing_fits() -> None:
    told = mpl_plan("--memory", "0.0001", "--flops", "1e11")
    assert told.exit_code == 1
    for words in ("reduced: three_blocks", "mpl-soft", "mpl-hard", "DOES NOT FIT", "is short of"):
        assert words in told.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--accelerators", "0", *DIGITS), "at least 1"),
        (("--accelerators", "6", "--per-node", "4", *DIGITS), "must divide --accelerators"),
        (("--accelerators", "5", *DIGITS), "must divide every batch"),
        (("--accelerator", "h100"), "no accelerator 'h100'"),
        (("--accelerator", "tpu-v3-core"), "give --flops"),
        (("--calibrate", *DIGITS), "not both"),
        (("--set", "train_reduced.teacher=fixed", *DIGITS), "planned with 'calibrator'"),
        (("--set", "train_reduced.model.name=resnet81", *DIGITS), "did you mean"),
        (("--set", "train_mpl=null", "--method", "mpl-soft", *DIGITS), "no section train_mpl"),
    ],
)
def test_wrong_use_is_answered_by_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    """`stages.cli` makes exit status 2 of a UsageError."""
    chosen = () if "--method" in arguments else ("--method", "reduced")
    found = mpl_plan(*chosen, *arguments).exception
    assert isinstance(found, UsageError)
    assert words in str(found)
