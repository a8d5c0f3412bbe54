"""The stages one after another, as a person runs them."""

import csv
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import load_recipe
from pipeline.storage.runs import Run
from pipeline.storage.tables import fixed_numbers
from tests.stages.reproduce.comparisons import run_here

STAGES = ("pretrain", "filter", "precompute", "train-reduced", "finetune", "evaluate")


def test_the_whole_chain_without_arguments(mpl, tmp_path, monkeypatch, recipe) -> None:
    """pretrain, filter --k 12800, precompute, train-reduced, evaluate in an empty directory."""
    monkeypatch.chdir(tmp_path)
    short = ["--set", "pretrain.steps=60", "--set", "train_reduced.steps=60"]
    assert mpl("pretrain", *short).status == 0
    filtered = mpl("filter", "--k", 12800)
    assert filtered.status == 0
    assert "Fewer than K = 12,800 are available" in filtered.err
    for stage in ("precompute", "train-reduced"):
        assert mpl(stage).status == 0
    judged = mpl("evaluate", "--json")
    assert judged.status == 0
    result = json.loads(judged.out.splitlines()[-1])["result"]
    assert result == json.loads((tmp_path / "runs/default/evaluation.json").read_text())
    assert result["images"] == 500
    assert 10 < result["top1"] <= result["top5"] <= 100
    kept = json.loads((tmp_path / "runs/default/run.json").read_text())["recipe"]
    assert (kept["filter"]["k"], kept["pretrain"]["steps"]) == (12800, 60)


def test_a_second_time_nothing_is_done(mpl, run) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    for stage in ("pretrain", "filter", "precompute", "train-reduced", "evaluate"):
        outcome = mpl(stage, "--run", run)
        assert outcome.status == 0
        assert "already done" in outcome.err
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_every_image_is_kept_or_rejected_with_a_reason(run) -> None:
    selection = pq.read_table(run / "selection.parquet")
    rejected = [pq.read_table(path) for path in sorted((run / "rejected").glob("*.parquet"))]
    kept = set(zip(selection["shard"].to_pylist(), selection["row"].to_pylist(), strict=True))
    dropped = {pair for t in rejected for pair in zip(t["shard"].to_pylist(), t["row"].to_pylist(), strict=True)}
    assert not kept & dropped
    assert len(kept) + len(dropped) == 1347
    assert all(reason for t in rejected for reason in t["reason"].to_pylist())


def test_networks_load_by_timm_from_their_folder(run) -> None:
    model = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True)
    expected = load_file(run / "student" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_another_k_selects_again_without_the_teacher_and_marks_the_targets_stale(mpl, run) -> None:
    scores = {p: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    outcome = mpl("filter", "--run", run, "--k", 10)
    assert outcome.status == 0
    assert "rules.k: 30 → 10" in outcome.err
    assert scores == {p: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    stale = mpl("train-reduced", "--run", run)
    assert stale.status == 1
    assert "another selection" in stale.err
    assert "run mpl precompute" in stale.err
    assert "Resume with" not in stale.err
    states = {r["stage"]: r for r in json.loads(mpl("status", "--run", run, "--json").out)["stages"]}
    assert {name: states[name]["state"] for name in ("filter", "precompute", "train-reduced")} == {
        "filter": "done", "precompute": "stale", "train-reduced": "stale"
    }  # fmt: skip
    again = mpl("precompute", "--run", run)
    assert again.status == 0
    assert "made again: selection" in again.err
    states = {r["stage"]: r for r in json.loads(mpl("status", "--run", run, "--json").out)["stages"]}
    assert states["precompute"]["state"] == "done"
    assert states["train-reduced"]["detail"].startswith("trained on other targets")
    refused = mpl("train-reduced", "--run", run)
    assert refused.status == 1
    assert "--force" in refused.err


def test_changed_settings_are_refused_with_both_ways_out(mpl, run) -> None:
    outcome = mpl("train-reduced", "--run", run, "--set", "train_reduced.steps=30")
    assert outcome.status == 1
    for words in ("settings.steps: 24 → 30", "--force", "another --run"):
        assert words in outcome.err


def test_settings_that_do_not_fit_name_the_flag(mpl, tmp_path) -> None:
    outcome = mpl("pretrain", "--run", tmp_path / "run", "--set", "pretrain.steps=40")
    assert outcome.status == 2
    assert "schedule.warmup_steps (=50) must be below steps (=40)" in outcome.err
    assert "--set pretrain.schedule.warmup_steps=4" in outcome.err
    both = ["--set", "pretrain.steps=40", "--set", "pretrain.schedule.warmup_steps=4", "--dry-run"]
    assert mpl("pretrain", "--run", tmp_path / "run", *both).status == 0
    wait = ["--set", "train_mpl.steps=60", "--set", "train_mpl.student_wait=10"]
    mine = mpl("train-mpl", "--run", tmp_path / "run", *wait)
    assert "--set train_mpl.student_wait=0 --set train_mpl.schedule.warmup_steps=6" in mine.err


def test_dry_run_does_nothing_and_says_why(mpl, run, tmp_path) -> None:
    outcome = mpl("train-reduced", "--run", run, "--seed", 5, "--dry-run", "--json")
    assert json.loads(outcome.out)["action"] == "refuse"
    assert "seed: 0 → 5" in outcome.err
    new = tmp_path / "new"
    assert mpl("pretrain", "--run", new, "--dry-run").status == 0
    assert not new.exists()


@pytest.mark.parametrize("teacher", ["fixed", "none"])
def test_baselines_are_the_same_loop_with_another_teacher(mpl, run, teacher) -> None:
    outcome = mpl("train-reduced", "--run", run, "--teacher", teacher, "--name", teacher, "--json")
    assert outcome.status == 0
    result = json.loads(outcome.out.splitlines()[-1])["result"]
    assert result["method"] == {"fixed": "NoisyStudent", "none": "Supervised"}[teacher]
    assert result["batch_of"] == {"fixed": {"labelled": 4, "pool": 12}, "none": {"labelled": 16, "pool": 0}}[teacher]
    assert json.loads((run / "run.json").read_text())["recipe"]["train_reduced"]["teacher"] == "calibrator"
    assert mpl("evaluate", "--run", run, "--name", teacher).status == 0
    assert (run / f"evaluation-{teacher}.json").exists()


def test_finetune_then_evaluate_judges_the_finetuned_student(mpl, run) -> None:
    assert mpl("finetune", "--run", run).status == 0
    assert mpl("evaluate", "--run", run).status == 0
    assert json.loads((run / "evaluation.json").read_text())["network"].endswith("student-finetuned")


def test_no_evaluation_overwrites_another(mpl, run) -> None:
    """Of a network and a split each has its file; evaluation.json is the run's last student's."""
    outcome = mpl("evaluate", "--run", run, "--network", run / "teacher")
    assert outcome.status == 0
    assert mpl("evaluate", "--run", run, "--network", run / "teacher", "--split", "validation").status == 0
    assert json.loads((run / "evaluation.json").read_text())["network"].endswith("student")
    assert mpl("finetune", "--run", run).status == 0
    assert mpl("evaluate", "--run", run).status == 0
    assert json.loads((run / "evaluation.json").read_text())["network"].endswith("student-finetuned")
    found = {path.stem: json.loads(path.read_text()) for path in (run / "evaluations").iterdir()}
    assert {name: Path(r["network"]).name for name, r in found.items()} == {
        "student-test": "student", "student-finetuned-test": "student-finetuned", "teacher-test": "teacher",
        "teacher-validation": "teacher",
    }  # fmt: skip
    result = found["teacher-test"]
    assert "always the most frequent class: 10.0%" in outcome.err
    assert f"95% interval {result['top1_interval'][0]:.1f} to {result['top1_interval'][1]:.1f}" in outcome.err
    lines = outcome.err.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("class")) + 1 :][:10]
    assert [line.split()[:2] for line in table] == [[str(c), "50"] for c in range(10)]
    matrix = lines[next(i for i, line in enumerate(lines) if "taken for" in line) + 1 :][:10]
    for c, line in enumerate(matrix):
        assert [int(text) for text in line.split()[1:]] == [
            result["confusion"][str(c)].get(str(j), 0) for j in range(10)
        ]


def test_precompute_check_infers_again(mpl, run) -> None:
    outcome = mpl("precompute", "--run", run, "--check", 50, "--json")
    assert outcome.status == 0
    assert 0 < json.loads(outcome.out)["largest_difference"] < 1e-3


def test_a_teacher_of_your_own(mpl, run, tmp_path, recipe) -> None:
    """`filter --teacher PATH` in a run that never trained one."""
    other = tmp_path / "other"
    assert mpl("filter", "--recipe", recipe, "--run", other, "--teacher", run / "teacher").status == 0
    assert mpl("precompute", "--run", other).status == 0
    assert pq.read_table(other / "selection.parquet").equals(pq.read_table(run / "selection.parquet"))


def test_a_teacher_with_other_classes_is_refused(mpl, run, tmp_path, recipe) -> None:
    config = json.loads((run / "teacher/config.json").read_text())
    del config["weights_sha256"]
    names = config.pop("label_names")
    for stated, words in (([*names[:-1], "ten"], "it lacks 9; the data set lacks ten"), (None, "--assume-class-order")):
        (run / "teacher/config.json").write_text(json.dumps(config | ({"label_names": stated} if stated else {})))
        outcome = mpl("filter", "--recipe", recipe, "--run", tmp_path / "other", "--teacher", run / "teacher")
        assert outcome.status == 1
        assert words in outcome.err
    more = ["--teacher", run / "teacher", "--assume-class-order"]
    assert mpl("filter", "--recipe", recipe, "--run", tmp_path / "assumed", *more).status == 0
    assert mpl("precompute", "--run", tmp_path / "assumed").status == 0


def test_a_teacher_with_the_classes_in_another_order_selects_the_same(mpl, run, tmp_path, recipe) -> None:
    """As timm's `save_for_hf` writes it: the names in `pretrained_cfg`. The same weights, the outputs turned round."""
    other = tmp_path / "teacher"
    weights = load_file(run / "teacher/model.safetensors")
    for name in ("fc.weight", "fc.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    other.mkdir()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = json.loads((run / "teacher/config.json").read_text())
    del config["weights_sha256"]
    config["pretrained_cfg"]["label_names"] = config.pop("label_names")[::-1]
    (other / "config.json").write_text(json.dumps(config))
    outcome = mpl("filter", "--recipe", recipe, "--run", tmp_path / "other", "--teacher", other)
    assert outcome.status == 0
    assert "in another order; they are matched by name" in outcome.err
    columns = ["key", "class", "rank"]
    selections = [pq.read_table(path / "selection.parquet").select(columns) for path in (run, tmp_path / "other")]
    assert selections[0].equals(selections[1])
    assert mpl("precompute", "--run", tmp_path / "other").status == 0
    tables = [pq.read_table(path / "targets") for path in (run, tmp_path / "other")]
    values = [fixed_numbers(t["distribution"].combine_chunks(), "<f2").astype(float) for t in tables]
    np.testing.assert_allclose(*values, atol=1e-3)  # float16, and the sum of the softmax in another order
    judged = [mpl("evaluate", "--run", run, "--network", path, "--json") for path in (run / "teacher", other)]
    top1 = [json.loads(outcome.out.splitlines()[-1])["result"]["top1"] for outcome in judged]
    assert top1[0] == top1[1]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict_any_images(mpl, run, tmp_path, suffix) -> None:
    """A row for everything that was found, in its order, under its own key."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("L", (30, 20), 200).save(folder / "grey.png")
    Image.new("RGBA", (9, 9), (255, 0, 0, 128)).save(folder / "clear.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image")
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(folder / "grey.png", "x.1.png")
            tar.add(folder / "clear.png", "x.2.png")
    inputs = [tmp_path / "b.tar.gz", folder, tmp_path / "a.tar", folder / "grey.png", folder / "grey.png"]
    output = tmp_path / f"table.{suffix}"
    outcome = mpl("predict", "--run", run, *inputs, "--output", output, "--json")
    assert outcome.status == 1  # one could not be read
    assert json.loads(outcome.out)["states"] == {"ok": 8, "decode_error": 1, "no_image": 1}
    if suffix == "csv":
        rows = list(csv.DictReader(output.read_text().splitlines()))
    else:
        rows = pq.read_table(output).to_pylist()
    t = str(tmp_path)
    assert [(row["key"].removeprefix(f"{t}/"), row["status"]) for row in rows] == [
        ("b.tar.gz/x.1.png", "ok"), ("b.tar.gz/x.2.png", "ok"), ("images/broken.jpg", "decode_error"),
        ("images/clear.png", "ok"), ("images/grey.png", "ok"), ("images/notes.txt", "no_image"),
        ("a.tar/x.1.png", "ok"), ("a.tar/x.2.png", "ok"), ("images/grey.png#2", "ok"), ("images/grey.png#3", "ok"),
    ]  # fmt: skip
    grey = [row for row in rows if "grey" in row["key"] or "x.1" in row["key"]]
    assert len({row["p:3"] for row in grey}) == 1
    assert sum(float(grey[0][f"p:{c}"]) for c in range(10)) == pytest.approx(1, abs=1e-6)
    assert max(range(10), key=lambda c: float(grey[0][f"p:{c}"])) == int(grey[0]["prediction"])
    assert mpl("predict", "--run", run, folder / "grey.png", "--output", output).status == 0
    gone = mpl("predict", "--run", run, folder, tmp_path / "gone.png", "--output", output)
    assert gone.status == 1
    assert "gone.png does not exist" in gone.err


def test_predict_with_logits_that_are_not_finite(mpl, run, tmp_path) -> None:
    """And classes that are called as columns are."""
    from PIL import Image

    weights = load_file(run / "student/model.safetensors")
    weights["fc.bias"][3] = float("nan")
    (tmp_path / "net").mkdir()
    save_file(weights, tmp_path / "net/model.safetensors", {"format": "pt"})
    config = json.loads((run / "student/config.json").read_text())
    del config["weights_sha256"]
    config["label_names"][:3] = ["key", "status", "prediction"]
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    output = tmp_path / "t.parquet"
    arguments = ["predict", "--run", run, tmp_path / "x.png", "--network", tmp_path / "net", "--output", output]
    assert mpl(*arguments).status == 1
    (row,) = pq.read_table(output).to_pylist()
    assert (row["key"], row["status"], row["prediction"], row["p:key"]) == (
        f"{tmp_path}/x.png",
        "nonfinite",
        None,
        None,
    )


def test_status_shows_where_a_run_stands(mpl, run) -> None:
    outcome = mpl("status", "--run", run, "--json")
    states = {row["stage"]: row["state"] for row in json.loads(outcome.out)["stages"]}
    assert states == {stage: "to come" if stage == "finetune" else "done" for stage in STAGES}


def test_doctor_finds_nothing_wrong(mpl) -> None:
    outcome = mpl("doctor", "--json")
    assert outcome.status == 0
    assert "digits" in json.loads(outcome.out)["data sets"]


def test_your_own_images_as_the_readme_says(mpl, tmp_path, monkeypatch, recipe) -> None:
    """A folder of photographs of two sizes and formats → import → the whole chain."""
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for label, name in enumerate(["red", "green", "blue", "unlabelled"]):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(30):
            pixels = random.integers(0, 120, (24, 40, 3), dtype=np.uint8)
            pixels[..., i % 3 if name == "unlabelled" else label] += 120
            Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    assert mpl("data", "import", "photos", "mydata").status == 0
    assert mpl("data", "check", "mydata/manifest.yaml", "--all").status == 0
    short = ["--recipe", recipe, "--set", "data.manifest=mydata", "--set", "data.image_size=16"]
    outcome = mpl("pretrain", "--run", "runs/mine", "--data", "mydata", *short)
    assert outcome.status == 0, outcome.err
    for stage in ("filter", "precompute", "train-reduced", "evaluate"):
        outcome = mpl(stage, "--run", "runs/mine")
        assert outcome.status == 0, outcome.err
    judged = json.loads((tmp_path / "runs/mine/evaluation.json").read_text())
    assert list(judged["per_class"]) == ["blue", "green", "red"]
    assert judged["images"] == 18


def test_data_and_recipe_agree(mpl, tmp_path, recipe) -> None:
    """An imported folder is enough; of two data sets none is taken in silence; without evaluation splits it trains."""
    from PIL import Image

    for name, colour in (("red", (250, 0, 0)), ("green", (0, 250, 0))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (13, 11), colour).point(lambda v, i=i: v - i).save(tmp_path / "photos" / name / f"{i}.png")
    data = tmp_path / "mydata"
    assert mpl("data", "import", tmp_path / "photos", data, "--validation", 0, "--test", 0).status == 0
    short = ["--set", "pretrain.steps=2", "--set", "pretrain.schedule.warmup_steps=1", "--set", "pretrain.batch=4"]
    outcome = mpl("pretrain", "--run", tmp_path / "a", "--data", data, *short)
    assert outcome.status == 0, outcome.err
    assert "there is no validation split" in outcome.err
    kept = json.loads((tmp_path / "a/run.json").read_text())["recipe"]
    assert (kept["name"], kept["data"]["manifest"], kept["data"]["image_size"]) == ("mydata", "mydata", 11)
    assert json.loads((tmp_path / "a/teacher/config.json").read_text())["label_names"] == ["green", "red"]
    assert mpl("status", "--run", tmp_path / "a").status == 0
    other = mpl("pretrain", "--run", tmp_path / "b", "--data", data, "--recipe", recipe)
    assert other.status == 2
    assert "holds the data set mydata" in other.err
    assert "is for digits" in other.err
    empty = mpl("pretrain", "--run", tmp_path / "b", "--data", tmp_path / "photos")
    assert empty.status == 2
    assert "holds no manifest.yaml" in empty.err
    assert not (tmp_path / "b").exists()


def test_reproduce_table2_and_again(mpl, tmp_path, recipe, monkeypatch) -> None:
    run = tmp_path / "table2"
    run_here(monkeypatch)  # in processes: tests/stages/reproduce/test_chains.py
    short = tmp_path / "short.yaml"
    short.write_text(recipe.read_text().replace("steps: 24", "steps: 8"))
    recipe = short
    outcome = mpl("reproduce", "table2", "--recipe", recipe, "--run", run, "--seeds", 1)
    assert outcome.status == 0, outcome.err
    outcome = mpl("reproduce", "table2", "--recipe", recipe, "--run", run, "--seeds", 2)  # one more
    assert outcome.status == 0, outcome.err
    table = json.loads((run / "table2.json").read_text())
    assert list(table["methods"]) == [
        "Supervised", "NoisyStudent", "NoisyStudent, on Reduced MPL's data", "Reduced MPL",
    ]  # fmt: skip
    rows = list(csv.DictReader((run / "table2.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert {len(m["results"]) for m in table["methods"].values()} == {2}
    assert "95% interval" in (run / "table2.md").read_text()
    assert (run / "table2.png").read_bytes().startswith(b"\x89PNG")
    again = mpl("reproduce", "table2", "--recipe", recipe, "--run", run, "--seeds", 2)
    assert "already done" in again.err
    teacher = (run / "seed-0/teacher/model.safetensors").stat().st_mtime_ns
    changed = ["--recipe", recipe, "--run", run, "--seeds", 1, "--set", "train_reduced.steps=9"]
    assert "--force" in mpl("reproduce", "table2", *changed).err
    assert mpl("reproduce", "table2", *changed, "--force").status == 0
    assert (run / "seed-0/teacher/model.safetensors").stat().st_mtime_ns == teacher
    assert "9 steps" in (run / "table2.md").read_text()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['mpl', '--help']\n"
        "from stages.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    commands = done.stdout.split("Commands:")[1]
    order = [
        "pretrain",
        "filter",
        "precompute",
        "train-reduced",
        "finetune",
        "evaluate",
        "predict",
        "reproduce",
    ]
    places = [commands.index(f"\n  {name} ") for name in order]
    assert places == sorted(places)


def test_status_data_list_and_a_recipe_import_no_torch(tmp_path: Path) -> None:
    Run(tmp_path / "run").keep(load_recipe("digits"), 0, None)
    code = (
        "import sys\n"
        "from stages.cli import mpl\n"
        "for arguments in (['status', '--run', sys.argv[1]], ['data', 'list']):\n"
        "    mpl.main(arguments, standalone_mode=False)\n"
        "from pipeline.config import load_recipe\n"
        "load_recipe('cifar10-4k')\n"
        "print([m for m in ('torch', 'timm', 'ray', 'faiss', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert "recipe digits, seed 0" in done.stdout
    assert "svhn" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_shadowing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "from stages.cli import main; main()"],
        cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{root}"},
    )  # fmt: skip
    assert done.returncode == 1
    assert str(tmp_path / "pipeline.py") in done.stderr


def test_a_pool_is_what_a_draw_leaves(mpl, tmp_path, recipe) -> None:
    """Labels drawn from a file, its other images in the pool, before those of another file; from filter to page."""
    import pyarrow.parquet as pq

    from pipeline.targets import TargetsStore
    from tests.data.made_images import encode, noise, write_parquet

    images = [encode(noise(16, seed)) for seed in range(80)]
    write_parquet(tmp_path / "train.parquet", images[:60], [0, 1] * 30)
    write_parquet(tmp_path / "web.parquet", images[60:])
    (tmp_path / "manifest.yaml").write_text(
        "name: mine\nclasses: 2\nclass_names: [cat, dog]\nimage: {size: 16}\n"
        "files: {train: {path: train.parquet, reader: parquet}, web: {path: web.parquet, reader: parquet}}\n"
        "splits:\n  labelled: {from: train, first: 40}\n  validation: {from: train, last: 10}\n"
        "  unlabelled: {from: train, drop_last: 10, without: labelled, also: [{from: web}]}\n"
    )
    short = ["--recipe", recipe, "--set", "data.manifest=mine", "--set", "data.image_size=16", "--seed", 3,
             "--set", "data.labelled=16", "--set", "filter.k=100", "--data", tmp_path]  # fmt: skip
    run = tmp_path / "run"
    assert mpl("pretrain", "--run", run, *short).status == 0
    for stage in (("filter", "--keep-copies"), ("precompute", "--workers", 2), ("train-reduced",), ("report",)):
        outcome = mpl(stage[0], "--run", run, *stage[1:])
        assert outcome.status == 0, outcome.err
    assert "No pictures" not in outcome.err
    store = TargetsStore.open(run / "targets")
    known = store.labelled()
    drawn = {("train", row) for row in known.row.tolist()}
    kept = {(shard, sample.row): sample.data for shard, sample in store.samples()}
    assert len(drawn) == 16
    assert kept.keys() == {("train", row) for row in range(50)} - drawn | {("web", row) for row in range(20)}
    for (shard, row), data in kept.items():
        assert data == images[row if shard == "train" else 60 + row]
    assert pq.read_table(run / "selection.parquet").num_rows >= 54
