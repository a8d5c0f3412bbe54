"""Nothing of the user's is deleted: stores, files beside ours, --force, names. docs/safety.md."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.storage.files import sha256_file
from tests.stages.commands import start, wait_for_step

FOREIGN = {  # as a person has them, in places where ours lie
    "rejected/IMG_0001.jpg": b"\xff\xd8 a photograph",
    "rejected/2019/IMG_0002.jpg": b"\xff\xd8 another",
    "targets/pool-mine.parquet": b"PAR1 mine PAR1",
    "scores/notes.txt": b"mine",
    ".notes.tmp": b"mine",
    "selection-of-mine.csv": b"a,b",
}


def put(folder: Path, names: dict[str, bytes] = FOREIGN) -> dict[Path, bytes]:
    for name, data in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {folder / name: data for name, data in names.items()}


def intact(files: dict[Path, bytes]) -> bool:
    return all(path.exists() and path.read_bytes() == data for path, data in files.items())


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_store_that_is_not_ours_is_refused(mpl, run: Path, tmp_path: Path, name: str, force) -> None:
    mine = put(tmp_path / "mine", {name: FOREIGN[name]})
    shutil.rmtree(run / "filter")
    refused = mpl("filter", "--run", run, "--store", tmp_path / "mine", *force)
    assert refused.status == 1
    assert "was not made by mpl" in refused.err
    assert name.split("/")[0] in refused.err
    assert intact(mine)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [name.split("/")[0]]


def test_an_empty_store_is_welcome_and_files_put_there_later_stay(mpl, run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for stage in ("filter", "precompute"):
        shutil.rmtree(run / stage)
    assert mpl("filter", "--run", run, "--store", store).status == 0
    mine = put(store, {name: data for name, data in FOREIGN.items() if not name.startswith("targets")})
    assert mpl("filter", "--run", run, "--k", 20).status == 0
    assert mpl("precompute", "--run", run).status == 0
    assert intact(mine)
    for stage in ("filter", "precompute"):
        done = mpl(stage, "--run", run, "--force")
        assert done.status == 0, done.err
        assert intact(mine)
    assert "left alone, as not ours" in mpl("filter", "--run", run, "--force").err


@pytest.mark.parametrize("name", ["pool-mine.parquet", "pool-mine.tar", "labelled-of-mine.parquet"])
def test_what_would_be_counted_into_the_targets_is_refused(mpl, run: Path, name: str) -> None:
    mine = put(run / "targets", {name: b"PAR1 mine"})
    before = sha256_file(run / "targets/_manifest.json")
    refused = mpl("precompute", "--run", run, "--set", "precompute.dtype=float32", "--force")
    assert refused.status == 1
    assert f"{name} is named like a file of the store" in refused.err
    assert intact(mine)
    assert sha256_file(run / "targets/_manifest.json") == before  # nothing was changed, as it says
    (run / "targets" / name).unlink()
    assert mpl("precompute", "--run", run).status == 0
    assert len(before) == 64


# --- --force keeps the old until the new stands -------------------------------------------------------------

STAGES = [("pretrain", "pretrain", "teacher"), ("train-reduced", "train_reduced", "student")]


@pytest.mark.parametrize(("stage", "section", "folder"), STAGES)
@pytest.mark.parametrize("change", ["model.name=wrn_16_3", "model.name=wrn_10_1.in1k", "optimizer.lr=1.0e+30"])
def test_force_with_settings_that_cannot_be_removes_nothing(mpl, run: Path, stage, section, folder, change) -> None:
    before = {path: sha256_file(path) for path in (run / folder).rglob("*") if path.is_file()}
    record = (run / stage / "record.json").read_bytes()
    failed = mpl(stage, "--run", run, "--force", "--set", f"{section}.{change}")
    assert failed.status in (1, 2)
    assert "--force" not in failed.err.split("Resume with")[-1] or "Resume with" not in failed.err
    after = {path: sha256_file(path) for path in (run / folder).rglob("*") if path.is_file()}
    assert before == after
    assert (run / stage / "record.json").read_bytes() == record
    rate = {"pretrain": 0.05, "train_reduced": 0.01}[section]
    again = mpl(stage, "--run", run, *(["--set", f"{section}.optimizer.lr={rate}"] if "lr" in change else []))
    assert "already done" in again.err


@pytest.mark.parametrize(("stage", "section", "folder"), [pytest.param(*STAGES[0], marks=pytest.mark.long), STAGES[1]])
def test_force_that_is_interrupted_goes_on_and_the_old_stands_till_then(run: Path, stage, section, folder) -> None:
    changes = ["--set", f"{section}.steps=60", "--set", f"{section}.checkpoint_every=10"]
    mine = put(run / folder, {"notes.txt": b"mine"})
    old = sha256_file(run / folder / "model.safetensors")
    process = start(stage, "--run", run, "--force", *changes)
    wait_for_step(run / f".{folder}.new", 20, process)
    process.kill()
    assert sha256_file(run / folder / "model.safetensors") == old
    status = start("evaluate", "--run", run, "--network", run / folder, "--split", "validation")
    assert status.wait() == 0, status.err
    resumed = start(stage, "--run", run, *changes)
    assert resumed.wait() == 0, resumed.err
    assert "goes on from step" in resumed.err
    assert sha256_file(run / folder / "model.safetensors") != old
    assert not (run / f".{folder}.new").exists()
    assert not (run / folder / "checkpoints").exists()
    assert intact(mine)
    digest = json.loads((run / stage / "record.json").read_text())["result"]["weights_sha256"]
    assert sha256_file(run / folder / "model.safetensors") == digest
    assert "already done" in (lambda again: again.wait() or again.err)(start(stage, "--run", run, *changes))


def test_a_student_of_the_other_method_stands_until_it_is_replaced(mpl, run: Path, mpl_section: Path) -> None:
    bad = ("--set", "train_mpl.model.name=wrn_16_3")
    old = sha256_file(run / "student/model.safetensors")
    failed = mpl("train-mpl", "--run", run, "--recipe", mpl_section, "--force", *bad)
    assert failed.status == 2, failed.err
    assert sha256_file(run / "student/model.safetensors") == old
    assert "already done" in mpl("train-reduced", "--run", run).err
    assert mpl("train-mpl", "--run", run, "--recipe", mpl_section, "--force").status == 0
    assert sha256_file(run / "student/model.safetensors") != old
    assert not (run / "train-reduced/record.json").exists()
    assert not (run / "student/calibrator.safetensors").exists()  # the other's


@pytest.fixture
def mpl_section(recipe: Path, tmp_path: Path) -> Path:
    from tests.stages.test_train_mpl import TINY

    (tmp_path / "mpl.yaml").write_text(recipe.read_text() + TINY)
    return tmp_path / "mpl.yaml"


def test_filter_and_precompute_try_before_they_remove(mpl, run: Path) -> None:
    before = {path: sha256_file(path) for path in run.rglob("part-*.parquet")}
    weights = run / "teacher/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    for stage in ("filter", "precompute"):
        failed = mpl(stage, "--run", run, "--force")
        assert failed.status == 1
        assert "cut short or edited" in failed.err or "does not hold the weights" in failed.err
    assert before == {path: sha256_file(path) for path in run.rglob("part-*.parquet")}
    assert (run / "selection.parquet").exists()
    assert (run / "targets/_manifest.json").exists()


# --- names ------------------------------------------------------------------------------------------------------


NAMES = [
    "../../escape", "/tmp/escape", "..", ".hidden", "a/b", "", "finetuned", "x-finetuned", "network-x", "a" * 65, "a b",
    "a\nb", "-x", "ä",
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "name"),
    [*(("train-reduced", name) for name in NAMES), *((s, NAMES[0]) for s in ("train-mpl", "finetune", "evaluate"))],
)
def test_names_that_would_leave_their_place_or_take_anothers(mpl, run: Path, stage: str, name: str) -> None:
    before = sorted(run.parent.rglob("*"))
    refused = mpl(stage, "--run", run, f"--name={name}")
    assert refused.status == 2
    assert "--name" in refused.err
    assert sorted(run.parent.rglob("*")) == before


def test_a_good_name(mpl, run: Path) -> None:
    assert mpl("train-reduced", "--run", run, "--name", "uda_2.b-1", "--teacher", "none").status == 0
    assert (run / "student-uda_2.b-1/model.safetensors").exists()


# --- what is read is what was recorded --------------------------------------------------------------------------


def test_targets_that_another_run_made_in_a_shared_store_are_not_trained_on(mpl, run: Path, tmp_path: Path) -> None:
    """A run and its copy: equal teacher and classes, another selection."""
    other = run.parent / "other"
    shutil.copytree(run, other)
    assert mpl("filter", "--run", other, "--k", 7).status == 0
    assert mpl("precompute", "--run", other).status == 0
    mine = (run / "targets/_manifest.json").read_bytes()
    shutil.rmtree(run / "targets")
    shutil.copytree(other / "targets", run / "targets")
    refused = mpl("train-reduced", "--run", run, "--name", "again")
    assert refused.status == 1
    assert "holds other targets than" in refused.err
    again = mpl("precompute", "--run", run)
    assert again.status == 0
    assert "holds other targets than this run made" in again.err
    assert json.loads((run / "targets/_manifest.json").read_bytes())["fingerprint"] == json.loads(mine)["fingerprint"]
    assert mpl("train-reduced", "--run", run, "--name", "again").status == 0


DAMAGE = [
    ("filter", "selection.parquet", "cut"),
    ("filter", "scores/part-*.parquet", "gone"),
    ("precompute", "targets/pool-*.parquet", "cut"),
    pytest.param("filter", "selection.parquet", "gone", marks=pytest.mark.long),
    pytest.param("filter", "scores/part-*.parquet", "cut", marks=pytest.mark.long),
    pytest.param("precompute", "targets/labelled-*.parquet", "gone", marks=pytest.mark.long),
]
CHANGED = [
    ("student", "config.json", "evaluate"),
    ("teacher", "model.safetensors", "pretrain"),
    pytest.param("student", "model.safetensors", "evaluate", marks=pytest.mark.long),
    pytest.param("student", "model.safetensors", "train-reduced", marks=pytest.mark.long),
    pytest.param("student", "config.json", "train-reduced", marks=pytest.mark.long),
    pytest.param("teacher", "config.json", "pretrain", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("stage", "pattern", "damage"), DAMAGE)
def test_damaged_output_is_made_again_and_not_called_done(mpl, run: Path, stage: str, pattern: str, damage) -> None:
    path = next(iter(sorted(run.glob(pattern))))
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-9])
    else:
        path.unlink()
    made = mpl(stage, "--run", run)
    assert made.status == 0, made.err
    assert "already done" not in made.err
    assert "made again" in made.err
    assert len(path.read_bytes()) == len(whole)
    assert "already done" in mpl(stage, "--run", run).err


@pytest.mark.parametrize(("folder", "file", "command"), CHANGED)
def test_a_network_that_was_changed_is_named(mpl, run: Path, folder: str, file: str, command: str) -> None:
    path = run / folder / file
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0.5", b"0.6", 1) if file == "config.json" else data[:-1] + b"\xff")
    assert path.read_bytes() != data
    refused = mpl(command, "--run", run)
    assert refused.status == 1
    assert f"{path} is not the file that was made" in refused.err
    path.write_bytes(data)
    assert mpl(command, "--run", run).status == 0


def test_a_teacher_whose_preprocessing_changed_between_scores_and_targets_is_refused(mpl, run: Path) -> None:
    path = run / "teacher/config.json"
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6", 1))
    refused = mpl("precompute", "--run", run, "--set", "precompute.dtype=float32", "--force")
    assert refused.status == 1
    assert "changed after the pool was scored" in refused.err


@pytest.mark.parametrize(
    "pattern",
    ["scores/part-*.parquet", "targets/pool-*.parquet"]
    + [pytest.param(pattern, marks=pytest.mark.long) for pattern in (
        "teacher/model.safetensors", "student/config.json", "selection.parquet", "targets/_manifest.json")],
)  # fmt: skip
def test_status_verify_reads_everything_that_was_made(mpl, run: Path, pattern: str) -> None:
    whole = mpl("status", "--run", run, "--verify")
    assert (whole.status, "all that is done was read" in whole.out) == (0, True)
    path = sorted(run.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    place = len(data) // 3  # inside, so that size and footer are as they were
    if path.suffix == ".parquet":
        group = pq.read_metadata(path).row_group(0)
        column = max(map(group.column, range(group.num_columns)), key=lambda column: column.total_compressed_size)
        place = column.data_page_offset + column.total_compressed_size // 2
    data[place] ^= 1
    path.write_bytes(data)
    found = mpl("status", "--run", run, "--verify", "--json")
    assert found.status == 1
    (problem,) = json.loads(found.out)["problems"]
    assert path.name in problem
