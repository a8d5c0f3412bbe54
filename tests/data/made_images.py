"""Small images and files for the tests of `pipeline.data`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image file's bytes."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: int, seed: int = 0) -> np.ndarray:
    """Random pixels, uint8 (size, size, 3)."""
    return np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(np.uint8)


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object] | None = None,
    *,
    names: Sequence[str] | None = None,
    label_type: pa.DataType | None = None,
    group: int = 4,
    plain: bool = False,
) -> Path:
    """A Parquet file in the Hugging Face layout (or, `plain`, with a binary column)."""
    if plain:
        columns = {"image": pa.array(images, pa.binary())}
    else:
        rows = [{"bytes": data, "path": f"{path.stem}/{i}.png"} for i, data in enumerate(images)]
        columns = {"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels, label_type)
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
