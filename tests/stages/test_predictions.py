"""Answers in the place of a network, from the file to the student; the programs of docs/teachers.md; kills."""

import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from pipeline import load_data_set
from pipeline.answers.out_of_fold import read_out_of_fold
from pipeline.targets import TargetsStore
from tests.object_storage import object_storage
from tests.stages.commands import start, wait_for_step
from tests.stages.conftest import Outcome

PAGE = Path(__file__).parents[2] / "docs/teachers.md"
DIGITS = [str(digit) for digit in range(10)]
OWN = [f"sign {c}" for c in range(25)]
MAP = {str(c): [OWN[2 * c], OWN[2 * c + 1]] for c in range(10)}
Mpl = Callable[..., Outcome]


def truth(keys: list[str]) -> np.ndarray:
    """The digit of each image; of a photograph 10."""
    labels = load_digits().target
    return np.array([labels[int(key.removeprefix("digit-"))] if key.startswith("digit-") else 10 for key in keys])


def all_keys() -> list[str]:
    data = load_data_set("digits")
    return [key for split in data.splits for key, _ in data.images(split)]


@pytest.fixture(scope="session")
def keys() -> list[str]:
    return all_keys()


@pytest.fixture(scope="session")
def own(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers in 25 classes of somebody's own: two for each digit, five for photographs."""
    draw = np.random.default_rng(0)
    labels = truth(keys)
    z = draw.normal(size=(len(keys), 25))
    z[np.arange(len(keys)), 2 * labels + np.where(labels < 10, draw.integers(0, 2, len(keys)), 0)] += 4
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    folder = tmp_path_factory.mktemp("own")
    table = pa.table({"key": keys, "probabilities": p.astype(np.float32).tolist()})
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(OWN)}), folder / "own.parquet")
    (folder / "map.yaml").write_text(json.dumps(MAP))
    return folder


def fake_open_clip() -> types.ModuleType:
    """Knows a picture by its grey values: as good as a stranger."""
    module = types.ModuleType("open_clip")

    class Model:
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.eye(len(tokens), 64)

        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return image

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.convert("L").resize((8, 8)), np.float32).ravel().copy())

    module.create_model_and_transforms = lambda name, pretrained: (Model(), None, preprocess)  # type: ignore[attr-defined]
    module.get_tokenizer = lambda name: lambda texts: torch.zeros(len(texts), 4)  # type: ignore[attr-defined]
    return module


def asked(image: Image.Image, names: tuple[str, ...]) -> str:
    """A vision-language model that does not always answer."""
    grey = int(np.asarray(image.convert("L")).astype(int).sum())
    return "I cannot tell" if grey % 9 == 0 else names[grey % len(names)]


def test_the_programs_of_the_page_make_answers_that_are_taken(
    mpl: Mpl, recipe: Path, tmp_path: Path, monkeypatch
) -> None:
    """A zero-shot CLIP, a vision-language model, scikit-learn, and votes."""
    from sklearn.ensemble import RandomForestClassifier

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", fake_open_clip())
    images, labels = load_digits(return_X_y=True)
    forest = RandomForestClassifier(10, random_state=0).fit(np.rint(images * (255 / 16)), labels)
    people = [lambda key: DIGITS[hash_of(key) % 10], lambda key: None, lambda key: DIGITS[hash_of(key + "!") % 10]]
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 4
    for program, file, form in zip(
        programs, ("clip.parquet", "vlm.jsonl", "forest.csv", "votes.jsonl"),
        ("probabilities", "labels", "probabilities", "votes"), strict=True,
    ):  # fmt: skip
        exec(program, {"ask": asked, "forest": forest, "people": people})
        run = tmp_path / f"run-{file}"
        outcome = mpl("filter", "--run", run, "--recipe", recipe, "--predictions", file)
        assert outcome.status == 0, outcome.err
        assert f"({form})" in outcome.err
        record = json.loads((run / "filter/record.json").read_text())["result"]
        assert record["images"] == 1347
        assert record["teacher"] is None
        missing = 1347 - record["answers"]["answered"]["unlabelled"]
        assert record["rejected"].get("no_prediction", 0) == missing
        assert (missing > 0) == (file == "vlm.jsonl")
        assert ("'I cannot tell'" in outcome.err) == (file == "vlm.jsonl")
    good = json.loads((tmp_path / "run-forest.csv/filter/record.json").read_text())["result"]
    assert min(c["threshold"] for c in good["classes"]) > 0  # a forest that has seen the digits is sure


def hash_of(text: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(text))


@pytest.mark.parametrize("correction", ["map", "fit"])
def test_a_teacher_with_classes_of_its_own(mpl: Mpl, recipe: Path, own: Path, tmp_path: Path, correction: str) -> None:
    """From answers in 25 classes to a student in ten, in memory and streamed; corrected anew from the same targets."""
    run, options = tmp_path / "run", ["--run", tmp_path / "run"]
    answers = Path(shutil.copy(own / "own.parquet", tmp_path))
    first = ["--recipe", recipe, "--predictions", answers]
    refused = mpl("filter", *options, *first)
    assert refused.status == 1
    assert "--class-map FILE" in refused.err
    chosen = ["--class-map", own / "map.yaml"] if correction == "map" else ["--correction", "fit"]
    outcome = mpl("filter", *options, *first, *chosen)
    assert outcome.status == 0, outcome.err
    assert "already done" in mpl("filter", *options).err
    selection = pq.read_table(run / "selection.parquet")
    answers.unlink()  # nothing after mpl filter needs it
    kept = truth(selection["key"].to_pylist()) == selection["class"].to_numpy()
    assert kept.mean() > (0.9 if correction == "map" else 0.6)
    assert mpl("precompute", *options).status == 0
    store = TargetsStore.open(run / "targets", class_names=DIGITS)
    assert (len(store.class_names), store.target_names) == (25, tuple(DIGITS))
    assert store.labelled().distributions.shape == (50, 25)
    answered = {row["key"]: row["probabilities"] for row in pq.read_table(own / "own.parquet").to_pylist()}
    for key, q in zip(store.keys(), store.distributions(), strict=True):
        np.testing.assert_allclose(q, answered[key], atol=1e-3)
    variants = {
        "plain": [],
        "fixed": ["--teacher", "fixed"],
        "streamed": ["--set", "train_reduced.reading=stream"],
        "supervised": ["--set", "train_reduced.calibrator.supervised_weight=1"],
        "weighed": ["--set", "train_reduced.calibrator.image_weights=true"],
    }
    for name, more in variants.items():
        trained = mpl("train-reduced", *options, "--name", name, *more)
        assert trained.status == 0, trained.err
    shown = mpl("calibrate", *options)
    assert shown.status == 0, shown.err
    judged = json.loads((run / "calibrate/calibration.json").read_text())["candidates"]
    assert judged[-1]["top1"] > 50
    for figure in ("reliability", "movements"):
        assert (run / f"calibrate/{figure}.png").read_bytes().startswith(b"\x89PNG")
    moved = json.loads((run / "calibrate/calibration.json").read_text())["movements"]
    assert {one["answer"] for one in moved} <= set(OWN)
    page = mpl("report", *options)
    assert page.status == 0, page.err
    other = "fit" if correction == "map" else "identity"
    again = mpl("train-reduced", *options, "--name", "other", "--set", f"train_reduced.correction={other}")
    assert again.status == (0 if other == "fit" else 2), again.err
    assert "there is none to ask" in mpl("precompute", *options, "--check", 3).err
    assert mpl("status", *options, "--verify").status == 0
    (run / "correction.safetensors").write_bytes(b"x" * 50)
    assert "correction.safetensors cannot be read" in mpl("precompute", *options, "--force").err


def test_a_network_with_other_classes(mpl: Mpl, recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Another name for one class is another class, until a map says which."""
    foreign = Path(shutil.copytree(finished / "teacher", tmp_path / "foreign"))
    config = json.loads((foreign / "config.json").read_text())
    names = config.get("label_names") or config["pretrained_cfg"]["label_names"]
    assert names == DIGITS
    text = (
        (foreign / "config.json")
        .read_text()
        .replace(json.dumps(DIGITS)[1:-1], json.dumps([f"n{d}" for d in DIGITS])[1:-1])
    )
    config["label_names"] = [f"n{d}" for d in DIGITS]
    (foreign / "config.json").write_text(text if '"n3"' in text else json.dumps(config))
    options = ["--run", tmp_path / "run", "--recipe", recipe, "--teacher", foreign]
    refused = mpl("filter", *options)
    assert "has other classes than the data set" in refused.err
    assert "--correction fit" in refused.err
    (tmp_path / "map.yaml").write_text(json.dumps({d: f"n{d}" for d in DIGITS}))
    outcome = mpl("filter", *options, "--class-map", tmp_path / "map.yaml")
    assert outcome.status == 0, outcome.err
    mine, theirs = (pq.read_table(run / "selection.parquet") for run in (tmp_path / "run", finished))
    for column in ("key", "class", "rank"):
        assert mine[column].equals(theirs[column])
    assert mpl("precompute", "--run", tmp_path / "run").status == 0
    assert mpl("precompute", "--run", tmp_path / "run", "--check", 5).status == 0
    assert mpl("train-reduced", "--run", tmp_path / "run").status == 0


def test_embeddings_beside_the_answers(mpl: Mpl, recipe: Path, own: Path, tmp_path: Path) -> None:
    """A column of the file, in any order of its rows, as far as the calibrator; and what is wrong with one is said."""
    table = pq.read_table(own / "own.parquet")
    known = {key: [float(hash_of(key) % 7), float(hash_of(key) % 11), 1.0] for key in table["key"].to_pylist()}

    def write(name: str, embeddings: list, rows: pa.Table = table) -> Path:
        beside = rows.append_column("embedding", pa.array(embeddings, pa.list_(pa.float32())))
        pq.write_table(beside.take(np.random.default_rng(0).permutation(len(rows))), tmp_path / name)
        return tmp_path / name

    def filtered(run: str, file: Path) -> Outcome:
        return mpl("filter", "--run", tmp_path / run, "--recipe", recipe, "--predictions", file, "--correction", "fit")

    rows = [known[key] for key in table["key"].to_pylist()]
    wrong = {
        "short": ([rows[0][:2], *rows[1:]], "numbers, others have"),
        "null": ([None, *rows[1:]], "has an embedding of 0 numbers"),
        "nan": ([[float("nan"), 1.0, 1.0], *rows[1:]], "an embedding with a number that is not finite"),
    }
    for name, (embeddings, words) in wrong.items():
        outcome = filtered(name, write(f"{name}.parquet", embeddings))
        assert outcome.status == 1
        assert words in outcome.err
    options = ["--run", tmp_path / "run"]
    assert filtered("run", write("good.parquet", rows)).status == 0
    outcome = mpl("precompute", *options, "--set", "precompute.embedding=8")
    assert outcome.status == 0, outcome.err
    assert "already done" in mpl("precompute", *options).err
    store = TargetsStore.open(tmp_path / "run/targets", class_names=DIGITS)
    assert store.embedding == 2  # the third number is the same for all
    raw = np.array([known[key][:2] for key in list(store.keys())])
    for column in store.embeddings().T:  # a linear map of what was in the file
        fit = np.linalg.lstsq(np.column_stack([raw, np.ones(len(raw))]), column, rcond=None)
        np.testing.assert_allclose(np.column_stack([raw, np.ones(len(raw))]) @ fit[0], column, atol=5e-3)
    for name, more in {"plain": [], "streamed": ["--set", "train_reduced.reading=stream"]}.items():
        trained = mpl(
            "train-reduced", *options, "--name", name, *more,
            "--set", "train_reduced.calibrator.supervised_weight=1",
            "--set", "train_reduced.student_data=pool+labelled",
        )  # fmt: skip
        assert trained.status == 0, trained.err
        weights = load_file(tmp_path / f"run/student-{name}/calibrator.safetensors")
        assert weights["layers.0.weight"].shape[1] == 25 + 2
    blind = mpl("train-reduced", *options, "--name", "blind", "--set", "train_reduced.calibrator.embedding=false")
    assert blind.status == 0, blind.err
    assert load_file(tmp_path / "run/student-blind/calibrator.safetensors")["layers.0.weight"].shape[1] == 25
    assert filtered("other", own / "own.parquet").status == 0
    outcome = mpl("precompute", "--run", tmp_path / "other", "--set", "precompute.embedding=8")
    assert "the predictions have no column `embedding`" in outcome.err


def test_a_networks_own_embedding(mpl: Mpl, run: Path) -> None:
    """With the data set's own classes; workers make the same store; another number is another store."""
    outcome = mpl("precompute", "--run", run, "--set", "precompute.embedding=6", "--force")
    assert outcome.status == 0, outcome.err
    store = TargetsStore.open(run / "targets")
    first = store.embeddings()
    assert first.shape == (store.count, 6)
    trained = mpl("train-reduced", "--run", run, "--name", "seeing")
    assert trained.status == 0, trained.err
    assert load_file(run / "student-seeing/calibrator.safetensors")["layers.0.weight"].shape[1] == 10 + 6
    assert mpl("precompute", "--run", run, "--workers", 2, "--force").status == 0
    np.testing.assert_array_equal(TargetsStore.open(run / "targets").embeddings(), first)
    assert "embedding: 6 → 3" in mpl("precompute", "--run", run, "--set", "precompute.embedding=3").err


def test_answers_that_change_are_scored_again_and_go_with_another_teacher(
    mpl: Mpl, run: Path, keys: list[str], tmp_path: Path
) -> None:
    def write(shift: int) -> Path:
        rows = [{"key": k, "label": int((d + shift) % 10)} for k, d in zip(keys, truth(keys), strict=True)]
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    assert "--force" in mpl("filter", "--run", run, "--predictions", write(0)).err  # it has another teacher's
    outcome = mpl("filter", "--run", run, "--predictions", write(0), "--force")
    assert outcome.status == 0, outcome.err
    selection = pq.read_table(run / "selection.parquet")
    right = truth(selection["key"].to_pylist()) == selection["class"].to_numpy()
    assert right[truth(selection["key"].to_pylist()) < 10].all()
    write(1)
    assert mpl("filter", "--run", run).status == 1  # the answers are others now
    assert mpl("filter", "--run", run, "--force").status == 0
    assert mpl("filter", "--run", run, "--teacher", run / "teacher", "--force").status == 0
    assert json.loads((run / "filter/record.json").read_text())["result"]["teacher"] == "teacher"


def test_answers_to_images_that_were_held_out(mpl: Mpl, recipe: Path, run: Path, tmp_path: Path) -> None:
    """The run's own teacher has nothing to be fitted to until it is cross-fitted."""
    refused = mpl("filter", "--run", run, "--correction", "fit")
    assert refused.status == 2
    assert "pretrain.folds=5" in refused.err
    told = mpl("calibrate", "--run", run)
    assert "is no evidence, and nothing is fitted" in told.err
    options = ["--run", tmp_path / "crossed", "--recipe", recipe, "--set", "pretrain.folds=3"]
    assert mpl("pretrain", *options).status == 0
    record = json.loads((tmp_path / "crossed/pretrain/record.json").read_text())["result"]
    found = read_out_of_fold(tmp_path / "crossed/teacher")
    assert found is not None
    assert np.bincount(found.folds).tolist() == [17, 17, 16]
    assert record["out_of_fold_top1"] == pytest.approx(100 * (found.distributions.argmax(1) == found.labels).mean())
    assert not (tmp_path / "crossed/teacher/folds").exists()
    with_folds, without = (load_file(path / "teacher/model.safetensors") for path in (tmp_path / "crossed", run))
    assert all(with_folds[name].equal(without[name]) for name in without)  # the teacher is the same
    outcome = mpl("filter", *options[:2], "--correction", "fit")
    assert outcome.status == 0, outcome.err
    assert "fitted to 50 labelled images" in outcome.err
    assert mpl("precompute", *options[:2]).status == 0
    stored = TargetsStore.open(tmp_path / "crossed/targets").labelled()
    q, places = found.of(list(zip(stored.shard, stored.row.tolist(), strict=True)))
    assert len(places) == 50
    np.testing.assert_allclose(stored.distributions, q, atol=1e-3)


def test_killed_while_folds_are_trained(recipe: Path, tmp_path: Path) -> None:
    options = ["--recipe", recipe, "--set", "pretrain.folds=2", "--set", "pretrain.steps=40"]
    process = start("pretrain", "--run", tmp_path / "killed", *options)
    wait_for_step(tmp_path / "killed/teacher/folds/fold-1", 10, process)
    process.kill()
    runs = [start("pretrain", "--run", tmp_path / name, *options) for name in ("killed", "whole")]
    assert [one.wait() for one in runs] == [0, 0], runs[0].err + runs[1].err
    for name in ("out_of_fold.parquet", "model.safetensors"):
        assert (tmp_path / "killed/teacher" / name).read_bytes() == (tmp_path / "whole/teacher" / name).read_bytes()


def test_killed_at_any_moment_the_answers_are_the_same(recipe: Path, own: Path, tmp_path: Path) -> None:
    """kill -9 while answers are read, dealt, and scored; the same command goes on."""
    command = [
        "filter",
        "--recipe",
        recipe,
        "--predictions",
        own / "own.parquet",
        "--class-map",
        own / "map.yaml",
        "--run",
    ]
    whole = start(*command, tmp_path / "whole")
    assert whole.wait() == 0, whole.err
    for moment in ("answers", "scores"):
        run = tmp_path / f"killed-{moment}"
        process = start(*command, run)
        while process.poll() is None and not list(run.glob(f"{moment}/*.parquet")):
            pass
        process.kill()
        again = start(*command, run)
        assert again.wait() == 0, again.err
        for path in [
            *tmp_path.glob("whole/scores/*"),
            *tmp_path.glob("whole/answers/*"),
            tmp_path / "whole/selection.parquet",
        ]:
            assert (run / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
        assert not [*run.rglob("*.tmp"), *run.glob(".answers*")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--predictions", "nowhere.parquet"], "there is no such file"),
        (["--predictions", "a.txt"], "predictions are .parquet"),
        (["--predictions", "a.csv", "--teacher", "x"], "give one of them"),
        (["--predictions", "a.csv", "--classes", "none.txt"], "--classes none.txt cannot be read"),
        (["--predictions", "a.csv"], "no key is that of an image"),
        (["--predictions", "b.csv"], "has no column of keys"),
        (["--predictions", "a.csv", "--correction", "identity", "--classes", "many.txt"], "predictions have 10,000"),
        (["--predictions", "many.parquet", "--correction", "map"], "none of the teacher's 10,000 classes is called 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    mpl: Mpl, recipe: Path, tmp_path: Path, monkeypatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    Path("a.csv").write_text("key,label\nnobody,3\n")
    Path("b.csv").write_text("label\n3\n")
    Path("many.txt").write_text("\n".join(f"class {c}" for c in range(10_000)))
    table = pa.table({"key": ["digit-0001"], "probabilities": [np.full(10_000, 1e-4, np.float32)]})
    names = json.dumps([f"class {c}" for c in range(10_000)])
    pq.write_table(table.replace_schema_metadata({"class_names": names}), "many.parquet")
    outcome = mpl("filter", "--run", tmp_path / "run", "--recipe", recipe, *options)
    assert outcome.status in (1, 2)
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run/selection.parquet").exists()


def test_answers_on_images_that_a_teacher_has_seen_are_no_evidence(
    mpl: Mpl, recipe: Path, own: Path, tmp_path: Path
) -> None:
    """Said once, of answers or of a network of somebody's: nothing is fitted to them, at no stage."""
    run = tmp_path / "run"
    answers = ["--predictions", own / "own.parquet", "--class-map", own / "map.yaml"]
    line = ["filter", "--run", run, "--recipe", recipe, *answers, "--seen-labels"]
    for kind in ("fit", "scaling"):
        refused = mpl(*line, "--correction", kind)
        assert refused.status == 2
        assert "was trained on the labelled images (--seen-labels)" in refused.err
    assert mpl(*line, "--correction", "map").status == 0
    assert mpl("precompute", "--run", run).status == 0
    refused = mpl("train-reduced", "--run", run, "--teacher", "fixed", "--set", "train_reduced.correction=fit")
    assert refused.status == 2
    assert "--held-out-labels" in refused.err
    outcome = mpl("calibrate", "--run", run)
    assert outcome.status == 0
    assert "nothing is fitted" in outcome.err
    assert mpl("filter", "--run", run, "--correction", "fit", "--held-out-labels").status == 0


def test_the_own_teachers_seen_labels_are_not_fitted_to_by_a_student(mpl: Mpl, run: Path) -> None:
    for kind in ("fit", "scaling"):
        refused = mpl("train-reduced", "--run", run, "--force", "--set", f"train_reduced.correction={kind}")
        assert refused.status == 2
        assert "pretrain.folds=5" in refused.err


def test_a_scaling_from_the_pool_to_the_student(mpl: Mpl, recipe: Path, own: Path, tmp_path: Path) -> None:
    """Selected with, stored, and read again; of the same targets a fit is another correction."""
    run = tmp_path / "run"
    answers = ["--predictions", own / "own.parquet", "--class-map", own / "map.yaml"]
    assert mpl("filter", "--run", run, "--recipe", recipe, *answers, "--correction", "scaling").status == 0
    assert mpl("precompute", "--run", run).status == 0
    store = TargetsStore.open(run / "targets")
    correction = store.correction()
    assert correction.kind == "scaling"
    assert correction.weight is None
    assert correction.bias is not None
    stored = store.labelled()
    right = (correction.targets(stored.distributions).argmax(axis=1) == stored.labels).mean()
    assert right > 0.9
    short = ["--set", "train_reduced.steps=2", "--set", "train_reduced.schedule.warmup_steps=0"]
    for kind in ("auto", "fit"):
        changes = ["--set", f"train_reduced.correction={kind}", *short]
        outcome = mpl("train-reduced", "--run", run, "--name", kind, *changes)
        assert outcome.status == 0, outcome.err


def test_another_order_of_the_classes_is_another_teacher(
    mpl: Mpl, recipe: Path, keys: list[str], tmp_path: Path
) -> None:
    """Said later, it is not "already done"; the files' own names may not be contradicted."""
    p = np.full((len(keys), 10), 0.01, np.float32)
    p[np.arange(len(keys)), np.minimum(truth(keys), 9)] = 0.91
    np.savez(tmp_path / "p.npz", key=np.array(keys), probabilities=p[:, ::-1].copy())
    (tmp_path / "names.txt").write_text("\n".join(DIGITS[::-1]))
    line = ["filter", "--run", tmp_path / "run", "--recipe", recipe, "--predictions", tmp_path / "p.npz"]
    assert mpl(*line, "--assume-class-order").status == 0
    refused = mpl(*line, "--classes", tmp_path / "names.txt")
    assert refused.status == 1
    assert "--force" in refused.err
    outcome = mpl(*line, "--classes", tmp_path / "names.txt", "--force")
    assert "right about 50 of the 50" in outcome.err


def test_seen_labels_said_of_a_finished_selection(mpl: Mpl, recipe: Path, own: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    answers = ["--predictions", own / "own.parquet", "--class-map", own / "map.yaml"]
    assert mpl("filter", "--run", run, "--recipe", recipe, *answers).status == 0
    assert mpl("precompute", "--run", run).status == 0
    assert "already done" not in mpl("filter", "--run", run, "--seen-labels").err
    refused = mpl("train-reduced", "--run", run, "--teacher", "fixed", "--set", "train_reduced.correction=fit")
    assert "--held-out-labels" in refused.err
    assert "nothing is fitted" in mpl("calibrate", "--run", run).err


def test_answers_are_what_was_imported(mpl: Mpl, recipe: Path, own: Path, tmp_path: Path) -> None:
    """Another teacher's file in their place, a damaged and a missing one: noticed, verified, and made again."""
    run, other = tmp_path / "run", tmp_path / "other"
    table = pq.read_table(own / "own.parquet")
    pq.write_table(table.slice(1), tmp_path / "fewer.parquet")
    mapped = ["--recipe", recipe, "--class-map", own / "map.yaml"]
    assert mpl("filter", "--run", run, *mapped, "--predictions", own / "own.parquet").status == 0
    assert mpl("filter", "--run", other, *mapped, "--predictions", tmp_path / "fewer.parquet").status == 0
    name = "answers/validation--part-validation.parquet"
    whole = (run / name).read_bytes()

    def is_noticed(advice: str) -> None:
        refused = mpl("calibrate", "--run", run)
        assert refused.status == 1
        assert advice in refused.err
        verified = mpl("status", "--run", run, "--verify")
        assert verified.status == 1
        assert "DAMAGED: filter" in verified.out

    shutil.copy(other / name, run / name)
    is_noticed("run mpl filter")
    assert mpl("filter", "--run", run).status == 0
    assert (run / name).read_bytes() == whole
    (run / name).unlink()
    is_noticed("run mpl filter")
    assert mpl("filter", "--run", run).status == 0
    place = whole.index(b"PAR1") + 400
    (run / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    is_noticed("run mpl filter --force")
    assert mpl("filter", "--run", run, "--force").status == 0
    assert mpl("calibrate", "--run", run).status == 0
    assert mpl("status", "--run", run, "--verify").status == 0


def test_a_table_does_not_take_the_place_of_what_is_none(mpl: Mpl, run: Path, tmp_path: Path) -> None:
    """`mpl predict --output`: of an input, of a file of somebody's, of a data set's; a table of ours is made again."""
    from tests.data.made_images import encode, noise

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(encode(noise(8)))
    line = ["predict", tmp_path / "photos", "--run", run, "--output"]
    for name, content in (("notes.csv", b"my,notes\n1,2\n"), ("empty.csv", b""), ("other.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        refused = mpl(*line, tmp_path / name)
        assert refused.status == 2
        assert "no table that mpl predict wrote" in refused.err
        assert (tmp_path / name).read_bytes() == content
    for name in ("ours.csv", "ours.parquet"):
        assert mpl(*line, tmp_path / name).status == 0
        assert mpl(*line, tmp_path / name).status == 0
    refused = mpl("predict", tmp_path / "ours.parquet", "--run", run, "--output", tmp_path / "ours.parquet")
    assert "one of the inputs" in refused.err


@pytest.fixture(scope="module")
def answers_with_embeddings(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = pq.read_table(own / "own.parquet")
    rows = [[float(hash_of(key) % 7), float(hash_of(key) % 11)] for key in table["key"].to_pylist()]
    path = tmp_path_factory.mktemp("answers") / "answers.parquet"
    pq.write_table(table.append_column("embedding", pa.array(rows, pa.list_(pa.float32()))), path)
    return path


def pool_outputs(mpl: Mpl, recipe: Path, own: Path, answers: object, run: Path, *more: object) -> dict[str, bytes]:
    """What the pool stages leave on disk, by name."""
    options = ["--run", run, "--set", "filter.k=40", "--recipe", recipe, "--class-map", own / "map.yaml"]
    outcome = mpl("filter", *options, "--predictions", answers, *more)
    assert outcome.status == 0, outcome.err
    engine = [option for option in more if option != "--store" and not str(option).startswith("s3:")]
    outcome = mpl("precompute", "--run", run, "--set", "precompute.embedding=2", *engine)
    assert outcome.status == 0, outcome.err
    names = ("copies.json", "selection.parquet", "scores", "rejected", "answers", "targets")
    paths = [path for name in names for path in [run / name, *sorted((run / name).rglob("*"))]]
    return whole({str(path.relative_to(run)): path.read_bytes() for path in paths if path.is_file()})


def whole(files: dict[str, bytes]) -> dict[str, bytes]:
    """But for safetensors, whose header may stand in any order."""
    return {name: data for name, data in files.items() if not name.endswith(".safetensors")}


@pytest.mark.parametrize(
    "engine",
    [("--workers", 2), pytest.param(("--engine", "ray", "--workers", 2), marks=[pytest.mark.long])],
    ids=["workers", "ray"],
)
def test_any_engine_makes_the_same_of_predictions(
    mpl: Mpl, recipe: Path, own: Path, answers_with_embeddings: Path, tmp_path: Path, engine: tuple
) -> None:
    alone = pool_outputs(mpl, recipe, own, answers_with_embeddings, tmp_path / "alone")
    assert len(alone) > 8
    assert pool_outputs(mpl, recipe, own, answers_with_embeddings, tmp_path / "run", *engine) == alone


@pytest.mark.long  # of a network's answers: tests/stages/test_store.py
def test_predictions_and_store_in_object_storage(
    mpl: Mpl, recipe: Path, own: Path, answers_with_embeddings: Path, tmp_path: Path, monkeypatch
) -> None:
    alone = pool_outputs(mpl, recipe, own, answers_with_embeddings, tmp_path / "alone")
    with object_storage() as storage:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        storage.put("answers/part.parquet", answers_with_embeddings.read_bytes())
        store = storage.url("store")
        assert pool_outputs(mpl, recipe, own, answers_with_embeddings, tmp_path / "run", "--store", store) == {}
        pool_outputs(mpl, recipe, own, storage.url("answers/part.parquet"), tmp_path / "read")
        root = storage.place("store")
        root.fs.invalidate_cache()
        found = {str(name).split("/store/", 1)[1]: root.fs.cat_file(name) for name in root.fs.find(root.path)}
        trained = mpl("train-reduced", "--run", tmp_path / "run")
        assert trained.status == 0, trained.err
    found.pop("store.json")
    assert {name for name in alone if found[name] != alone[name]} == set()
    assert whole(found).keys() == alone.keys()
    for name in ("selection.parquet", "targets/pool-00000.parquet", "targets/labelled-00000.parquet"):
        assert pq.read_table(tmp_path / "read" / name).equals(pq.read_table(tmp_path / "alone" / name))
