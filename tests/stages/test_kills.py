"""kill -9 of whole process groups, at random moments, while a pool is scored, selected and stored.

Two kills in `make test`, twenty in `make test-long`; `MPL_KILLS=100 python -m pytest tests/stages/test_kills.py
-m long -s` makes a hundred and prints what was hit (docs/results/survival.md).
"""

import hashlib
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.data.get.writing import Row, write_images
from tests.data.made_images import encode
from tests.stages.commands import Command, start

KILLS = int(os.environ.get("MPL_KILLS", "20"))
NAMES = ["ant", "bee", "cat"]
SHARDS, ROWS = 8, 120
RECIPE = """
name: kills
data: {manifest: pool-to-kill, image_size: 32}
pretrain: {model: {name: wrn_16_2}, steps: 2, batch: 8, optimizer: {rule: sgd, lr: 0.01}}
filter: {k: 125, batch: 32}
precompute: {shard_rows: 50}
train_reduced: {model: {name: wrn_10_1}, steps: 2}
finetune: {steps: 2}
"""
ENGINES = {
    "1 worker": ("--workers", "1"),
    "2 workers": ("--workers", "2"),
    "4 workers": ("--workers", "4"),
    "Ray": ("--engine", "ray", "--cpus-per-worker", "0.5"),
}
SHARE = {"1 worker": 0.35, "2 workers": 0.35, "4 workers": 0.15, "Ray": 0.15}
PHASES = {
    "filter": ["scores", "rejected", "scores", "scores"],
    "precompute": ["targets/spill", "targets", "targets/spill", "targets"],
}
FORMATS = ("parquet", "webdataset")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of eight shards with everything in it: repeats, copies of the test split, bad files."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.RandomState(0)
    coarse = draw.randint(0, 256, (SHARDS * ROWS + 60, 5, 5, 3)).astype(np.uint8)
    images = [Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC) for pixels in coarse]
    pool = [encode(image, "JPEG", quality=90) for image in images[60:]]
    pool[5], pool[350], pool[450], pool[451] = b"", b"no image", pool[3], encode(images[50], "JPEG", quality=60)
    for name, first in (("labelled", 0), ("validation", 20), ("test", 40)):
        rows = [Row(f"{name}-{at}", encode(images[at]), at % 3) for at in range(first, first + 20)]
        write_images(folder / f"{name}.parquet", rows, NAMES)
    for shard in range(SHARDS):
        rows = [Row(f"{at}", pool[at], -1) for at in range(shard * ROWS, (shard + 1) * ROWS)]
        write_images(folder / f"pool-{shard:05d}.parquet", rows, None)
    splits = {name: {"path": f"{name}.parquet", "reader": "parquet"} for name in ("labelled", "validation", "test")}
    manifest = {
        "name": "pool-to-kill",
        "classes": 3,
        "class_names": NAMES,
        "image": {"size": 32},
        "files": splits | {"pool": {"glob": "pool-*.parquet", "reader": "parquet"}},
        "splits": {name: {"from": name} for name in splits} | {"unlabelled": {"from": "pool"}},
    }
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return folder


def finish(process: Command) -> None:
    """Wait for success."""
    assert process.wait() == 0, process.err


def files_of(run: Path) -> dict[str, str]:
    """Content of all that the two stages leave, records (which hold times) apart."""
    wanted = ["selection.parquet", *(f"{name}/**/*" for name in ("scores", "rejected", "targets"))]
    paths = [path for pattern in wanted for path in run.glob(pattern) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def complete(run: Path) -> dict[Path, tuple[int, int]]:
    """Shards that are done, with what would change if they were done again."""
    paths = [*run.glob("scores/part-*.parquet"), *run.glob("targets/pool-*.parquet")]
    paths += [path for done in paths if (path := done.with_suffix(".tar")).exists()]  # its sidecar comes last
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def kill_at(process: Command, run: Path, phase: str, delay: float) -> bool:
    """Kill the group `delay` seconds after the phase is seen to have begun; False if it ended before."""
    folder = run / phase
    seen = set(folder.iterdir()) if folder.is_dir() else set()
    while process.poll() is None:
        if folder.is_dir() and set(folder.iterdir()) - seen:
            break
        time.sleep(0.002)
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    return alive


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, str]]]:
    """For each format a run with a teacher, and the files of an undisturbed run from there."""
    folder, found = tmp_path_factory.mktemp("reference"), {}
    (folder / "recipe.yaml").write_text(RECIPE)
    begun, whole = folder / "begun", folder / "whole"
    finish(start("pretrain", "--run", begun, "--recipe", folder / "recipe.yaml", "--data", data))
    shutil.copytree(begun, whole)
    finish(start("filter", "--run", whole))
    for form in FORMATS:
        finish(start("precompute", "--run", whole, "--force", "--set", f"precompute.format={form}"))
        found[form] = files_of(whole)
        assert len(found[form]) > 2 * SHARDS + 8
    return {form: (begun, files) for form, files in found.items()}


FEW = [("1 worker", 2)]  # workers that are killed: tests/storage/test_workers.py
MANY = [(engine, max(2, round(KILLS * share))) for engine, share in SHARE.items()]


@pytest.mark.timeout(600 + 120 * KILLS)
@pytest.mark.parametrize(("engine", "wanted"), FEW + [pytest.param(*case, marks=pytest.mark.long) for case in MANY])
def test_killed_at_random_moments(engine, wanted, reference, tmp_path) -> None:
    """The final files are those of an undisturbed run; no shard is done twice after it was complete; no litter."""
    draw, hits, attempt = random.Random(engine), Counter[str](), 0
    while hits.total() < wanted:
        attempt += 1
        form = FORMATS[attempt % 2]
        begun, expected = reference[form]
        run = tmp_path / f"run-{attempt}"
        shutil.copytree(begun, run)
        for command, phases in PHASES.items():
            more = [*ENGINES[engine], "--set", f"precompute.format={form}"]
            done: dict[Path, tuple[int, int]] = {}
            left = wanted - hits.total()  # the first stage has half of them
            for phase in phases[: left // 2 if command == "filter" and left < 2 * len(phases) else left]:
                process = start(command, "--run", run, *more)
                hits[phase] += kill_at(process, run, phase, draw.uniform(0, 0.3))
                assert done.items() <= complete(run).items()  # what was complete is as it was
                done = complete(run)
            finish(start(command, "--run", run, *more))
            assert done.items() <= complete(run).items()
        assert files_of(run) == expected
        assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    print(f"{engine}: {hits.total()} kills: " + ", ".join(f"{n} while writing {p}" for p, n in sorted(hits.items())))
