"""More steps of a finished training: it goes on where its rates do not depend on its length, else says why not."""

import pytest
from safetensors.torch import load_file

OPEN = [f"--set={section}.schedule.kind=constant" for section in ("pretrain", "train_reduced")]


@pytest.mark.parametrize(
    ("stage", "section", "folder"),
    [
        pytest.param("pretrain", "pretrain", "teacher", marks=pytest.mark.long),  # the same loop
        ("train-reduced", "train_reduced", "student"),
    ],
)
def test_a_longer_training_equals_one_of_that_length(mpl, recipe, run, tmp_path, stage, section, folder) -> None:
    """12 steps and then 24 are 24 steps, bit for bit; the calibrator's state is among what is kept."""
    weights = []
    for place, lengths in (("grown", (12, 24)), ("at once", (24,))):
        if stage == "train-reduced":
            import shutil

            shutil.copytree(run, tmp_path / place)
        more = ["--force"] if stage == "train-reduced" else ["--recipe", recipe]
        for steps in lengths:
            done = mpl(stage, "--run", tmp_path / place, f"--set={section}.steps={steps}", *OPEN, *more)
            assert done.status == 0, done.err
            more = []
        files = sorted((tmp_path / place / folder).glob("*.safetensors"))
        weights.append({(file.name, name): value for file in files for name, value in load_file(file).items()})
        if place == "grown":
            assert "goes on: settings.steps: 12 → 24" in done.err
            assert "goes on from step 12 of 24" in done.err
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert mpl("status", "--run", tmp_path / "grown").status == 0
    fewer = mpl(stage, "--run", tmp_path / "grown", f"--set={section}.steps=12", *OPEN)
    assert "was done with other inputs or settings (settings.steps: 24 → 12)" in fewer.err


def test_a_schedule_that_ends_says_why_it_cannot_go_on(mpl, run) -> None:
    before = (run / "teacher/model.safetensors").read_bytes()
    refused = mpl("pretrain", "--run", run, "--set", "pretrain.steps=48")
    assert refused.status == 1
    assert "settings.steps: 24 → 48" in refused.err
    assert "schedule.kind: cosine" in refused.err
    assert "Resume with" not in refused.err
    assert (run / "teacher/model.safetensors").read_bytes() == before
    other = mpl("pretrain", "--run", run, "--set", "pretrain.steps=48", "--set", "pretrain.batch=8")
    assert "cosine" not in other.err  # something else differs, too
