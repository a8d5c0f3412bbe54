"""Damage anywhere, in any kind of file: a sentence, never a traceback and never the end of the process."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.calibration import read_calibration
from pipeline.config import load_recipe
from pipeline.data.manifest import load_manifest
from pipeline.errors import UserError
from pipeline.networks.loading import load_network
from pipeline.pool.scores import read_scores, read_shard_scores
from pipeline.pool.selection import read_selection
from pipeline.storage.runs import Run
from pipeline.targets import TargetsStore
from stages.status import stage_names, stage_status, why_stale


def status(run: Path) -> None:
    """All that `mpl status` reads."""
    directory = Run(run)
    directory.description  # noqa: B018
    for stage in stage_names(directory):
        stage_status(directory, stage)
        if (record := directory.record(stage)) is not None:
            why_stale(directory, stage, record)


def targets(run: Path) -> None:
    store = TargetsStore.open(run / "targets")
    store.distributions()
    store.labelled()
    list(store.batches())


def scores(run: Path) -> None:
    for path in sorted((run / "scores").glob("*.parquet")):
        list(read_scores(read_shard_scores(path), ["row", "key", "status", "log_odds"]))


READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("recipe.yaml", lambda run: load_recipe(str(run / "recipe.yaml"))),
    ("manifest.yaml", lambda run: load_manifest(run / "manifest.yaml")),
    ("run.json", status),
    ("filter/record.json", status),
    ("train-reduced/record.json", status),
    ("student/metrics.csv", status),
    ("student/config.json", lambda run: load_network(run / "student")),
    ("student/model.safetensors", lambda run: load_network(run / "student")),
    ("student/calibration.json", lambda run: read_calibration(run / "student/calibration.json")),
    ("selection.parquet", lambda run: read_selection(run / "selection.parquet")),
    ("scores/part-*.parquet", scores),
    ("targets/_manifest.json", targets),
    ("targets/pool-*.parquet", targets),
    ("targets/labelled-*.parquet", targets),
]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One bit, some bytes, an end, or digits where there were none."""
    place = chance.randrange(len(data))
    kind = chance.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + b"9" * 5_000 + data[place:]
    if kind == 2:
        return data[:place] + chance.randbytes(4) + data[place + 4 :]
    if kind == 3:
        return data[:place] + data[place + chance.randrange(1, 40) :]
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


@pytest.mark.parametrize("count", [25, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize(("pattern", "reader"), READERS, ids=[pattern for pattern, _ in READERS])
def test_damage_is_a_sentence(run: Path, recipe: Path, pattern: str, reader, count: int) -> None:
    shutil.copy(recipe, run / "recipe.yaml")
    shutil.copy(Path(__file__).parents[2] / "data_manifests/digits.yaml", run / "manifest.yaml")
    path = sorted(run.glob(pattern))[0]
    whole, chance, refused = path.read_bytes(), random.Random(pattern), 0
    reader(run)
    for number in range(count):
        path.write_bytes(damaged(whole, chance))
        try:
            reader(run)
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"damage {number} to {pattern} is no sentence") from error
    assert refused or pattern == "student/metrics.csv"  # of which whole rows are read
