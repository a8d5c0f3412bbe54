"""kill -9, Ctrl-C, a full disk, a second process: nothing is lost and the same command goes on."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.storage.files import write_sealed
from pipeline.storage.metrics import read_metrics
from tests.stages.commands import start, wait_for_step

SLOW = ["--set", "{s}.steps=100", "--set", "{s}.checkpoint_every=10"]


CASES = [
    pytest.param("pretrain", "pretrain", "teacher", marks=pytest.mark.long),  # the same loop, with nothing beside it
    ("train-reduced", "train_reduced", "student"),
    ("train-mpl", "train_mpl", "student"),
]
MPL = """
train_mpl:
  model: {name: wrn_10_1, dropout: 0.1}
  method: {name: fixmatch, threshold: 0.1}
  steps: 24
  batch: 16
  labelled_batch: 10
  student_wait: 4
  log_every: 4
  optimizer: {rule: nesterov, lr: 0.02}
  augment: {rotate: 10, randaugment_layers: 1}
  feedback: hard
  feedback_options: {batch: 20, baseline: 0.9}
"""


@pytest.mark.parametrize(("stage", "section", "folder"), CASES)
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(recipe, run, tmp_path, stage, section, folder) -> None:
    """2N steps = N + kill -9 + the same command; weights and metrics, times apart."""
    changes = [text.format(s=section) for text in SLOW]
    where = [tmp_path / "killed", tmp_path / "undisturbed"]
    if stage == "train-reduced":
        for path in where:
            shutil.copytree(run, path)
        changes.append("--force")
    elif stage == "train-mpl":
        path = tmp_path / "tiny-mpl.yaml"
        path.write_text(recipe.read_text() + MPL)
        changes += ["--recipe", str(path)]
    else:
        changes += ["--recipe", str(recipe)]
    process = start(stage, "--run", where[0], *changes)
    wait_for_step(where[0] / (f".{folder}.new" if "--force" in changes else folder), 20, process)
    process.kill()
    again = [change for change in changes if change != "--force"]
    resumed = start(stage, "--run", where[0], *again)
    undisturbed = start(stage, "--run", where[1], *changes)
    assert resumed.wait() == 0, resumed.err
    assert "goes on" in resumed.err
    assert undisturbed.wait() == 0, undisturbed.err
    a, b = (load_file(path / folder / "model.safetensors") for path in where)
    assert all(a[name].equal(b[name]) for name in a)
    rows = [read_metrics(path / folder / "metrics.csv") for path in where]
    assert [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows[0]] == [
        {k: v for k, v in row.items() if k != "images_per_second"} for row in rows[1]
    ]


def test_ctrl_c_saves_the_step_and_ends_with_130(mpl, recipe, tmp_path) -> None:
    changes = [text.format(s="pretrain") for text in SLOW]
    process = start("pretrain", "--run", tmp_path / "run", "--recipe", recipe, *changes)
    wait_for_step(tmp_path / "run/teacher", 20, process)
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Resume with: mpl pretrain" in process.err
    assert "Traceback" not in process.err
    resumed = mpl("pretrain", "--run", tmp_path / "run", "--recipe", recipe, *changes)
    assert resumed.status == 0
    assert "goes on from step" in resumed.err


def test_a_full_disk_ends_with_one_message_and_can_go_on(mpl, recipe, tmp_path) -> None:
    process = start("pretrain", "--run", tmp_path / "run", "--recipe", recipe, file_bytes=100_000)
    assert process.wait() == 1
    assert "cannot write" in process.err
    assert "Resume with: mpl pretrain" in process.err
    assert "Traceback" not in process.err
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert mpl("pretrain", "--run", tmp_path / "run", "--recipe", recipe).status == 0


def test_a_run_in_use_is_refused(mpl, recipe, tmp_path) -> None:
    from pipeline.storage.runs import Run

    with Run(tmp_path / "run").locked():
        process = start("pretrain", "--run", tmp_path / "run", "--recipe", recipe)
        assert process.wait() == 1
    assert "in use by another process" in process.err


def test_a_foreign_directory_is_refused_and_left_alone(mpl, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    outcome = mpl("pretrain", "--run", tmp_path, "--force")
    assert outcome.status == 1
    assert "not a run directory" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written(mpl, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    outcome = mpl("pretrain", "--run", tmp_path / "file" / "run")
    assert outcome.status == 1
    assert "cannot make the run directory" in outcome.err


@pytest.fixture(scope="module")
def killed(recipe, tmp_path_factory) -> Path:
    """A run that was killed after its second checkpoint."""
    run = tmp_path_factory.mktemp("killed") / "run"
    process = start("pretrain", "--run", run, "--recipe", recipe, *(text.format(s="pretrain") for text in SLOW))
    wait_for_step(run / "teacher", 40, process)
    process.kill()
    return run


@pytest.mark.parametrize("damage", ["cut", "edited"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(mpl, recipe, killed, tmp_path, damage) -> None:
    """Then, with no sound one left, a message that says how to start again."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    changes = [text.format(s="pretrain") for text in SLOW]
    path = run / "teacher/checkpoints"
    entries = json.loads((path / "index.json").read_text())["checkpoints"]
    newest, older = path / entries[-1]["file"], path / entries[-2]["file"]
    data = newest.read_bytes()
    newest.write_bytes(data[:1000] if damage == "cut" else data[:5000] + b"x" + data[5001:])
    saved = older.read_bytes()
    older.write_bytes(b"")
    outcome = mpl("pretrain", "--run", run, "--recipe", recipe, *changes)
    assert outcome.status == 1
    assert "No sound checkpoint is left; start again with --force" in outcome.err
    older.write_bytes(saved)
    outcome = mpl("pretrain", "--run", run, "--recipe", recipe, *changes)
    assert outcome.status == 0
    assert "cut short or edited" in outcome.err
    assert f"goes on from step {entries[-2]['step']} of" in outcome.err


def test_a_loss_that_explodes_stops_with_the_remedy(mpl, recipe, tmp_path) -> None:
    outcome = mpl("pretrain", "--run", tmp_path / "run", "--recipe", recipe, "--set", "pretrain.optimizer.lr=1e30")
    assert outcome.status == 1
    for words in ("training stopped before that update", "Lower the learning rate"):
        assert words in outcome.err
    assert "Resume with" not in outcome.err  # it would come again
    assert not (tmp_path / "run/teacher/checkpoints").exists()  # it broke before the first checkpoint


@pytest.mark.parametrize("name", ["student/model.safetensors", "targets/_manifest.json", "selection.parquet"])
def test_half_written_files_are_noticed(mpl, run, name) -> None:
    path = run / name
    path.write_bytes(path.read_bytes()[:200])
    command = {
        "student": ["evaluate"],
        "targets": ["train-reduced", "--force"],
        "selection.parquet": ["precompute", "--force"],
    }
    outcome = mpl(*command[name.split("/")[0]], "--run", run)
    assert outcome.status == 1
    assert Path(name).name in outcome.err or str(path.parent) in outcome.err


def test_targets_of_another_teacher_are_refused(mpl, run) -> None:
    manifest = json.loads((run / "targets/_manifest.json").read_text())
    manifest["teacher"] = "0" * 64
    write_sealed(run / "targets/_manifest.json", manifest)
    outcome = mpl("train-reduced", "--run", run, "--force")
    assert outcome.status == 1
    assert "another teacher" in outcome.err


WRONG = [
    (["--set", "train_reduced.calibrator.hiden=3"], "did you mean train_reduced.calibrator.hidden?"),
    (["--set", "pretrain.steps=many"], "pretrain.steps"),
    (["--set", "filter.k=0"], "filter.k"),
    (["--set", "pretrain.optimizer.rule=adagrad"], "pretrain.optimizer.rule"),
    (["--set", "nonsense"], "expected section.key=value"),
    (["--recipe", "digit"], "did you mean digits?"),
    (["--set", "pretrain.model.name=wrn_28_3"], "did you mean wrn_28_"),
    (["--set", "data.manifest=digitz"], "digits"),
    (["--recipe", "cifar10-small"], "--data"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--set", "data.labelled=5000"], "5000"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_wrong_use_says_what_and_where(mpl, tmp_path, arguments, words) -> None:
    outcome = mpl("pretrain", "--run", tmp_path / "run", *arguments)
    assert outcome.status in (1, 2)
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_k_of_zero_is_wrong_use(mpl, run) -> None:
    outcome = mpl("filter", "--run", run, "--k", 0)
    assert outcome.status == 2
    assert "filter.k" in outcome.err


def test_stages_out_of_order_name_the_command_to_run_first(mpl, tmp_path, recipe) -> None:
    outcome = mpl("filter", "--run", tmp_path / "run", "--recipe", recipe)
    assert outcome.status == 1
    assert "mpl pretrain --run" in outcome.err
