"""A data folder of one's own for the tests of `pipeline.data`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def data_set(tmp_path: Path) -> Callable[..., Path]:
    """Writes `manifest.yaml` of a two-class data set named `mine`; keyword arguments replace its keys."""

    def write(**changes: object) -> Path:
        manifest: dict[str, object] = {
            "name": "mine",
            "classes": 2,
            "class_names": ["cat", "dog"],
            "image": {"size": 4},
            "files": {"train": {"path": "train.parquet", "reader": "parquet"}},
            "splits": {"labelled": {"from": "train"}},
        }
        manifest.update(changes)
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump(manifest))
        return path

    return write
