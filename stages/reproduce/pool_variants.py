"""Pools that go wrong in one way at a time: variants of the embedded digits, for experiments.

The labelled, validation and test images are those of `digits-draws`: a run with the seed of the variant's draw labels
50 images of its own. The pool is a sample of the other images, no image twice, in which a share of the images is out
of domain, or some classes are rarer than others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.draw import stratified
from pipeline.data.get.writing import Row, write_images, write_manifest
from pipeline.data.manifest import FileSpec, Manifest, SplitSpec, load_manifest
from pipeline.data.readers.digits import CLASSES, digits_shards
from pipeline.data.readers.shard import NO_LABEL, Sample
from pipeline.data.sources import open_split
from pipeline.errors import UsageError
from pipeline.seeds import permutation

DIGITS = "digits-draws"  # the data set that they are variants of


@dataclass(frozen=True)
class PoolVariant:
    """A pool of `size` images.

    Attributes:
        size: images.
        outside: share of them that is out of domain (pieces of photographs).
        imbalance: how much more frequent the most frequent digit is than the rarest; the others lie between them in
            a geometric row, in an order of the classes that depends on `draw` alone.
        draw: which sample, and which images are labelled. Variants of one draw share as many images as they can: where
            one has fewer of a kind, they are the first of the other's.
    """

    size: int
    outside: float = 0.0
    imbalance: float = 1.0
    draw: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.outside <= 1 or self.imbalance < 1 or self.draw < 0:
            raise UsageError(
                f"{self}: size is at least 1, outside from 0 to 1, imbalance at least 1, draw not negative"
            )

    @property
    def name(self) -> str:
        """Of the data set and its files; without a dot, which would end a shard's name."""
        text = f"digits-{self.size}-outside-{self.outside:g}-imbalance-{self.imbalance:g}-draw-{self.draw}"
        return text.replace(".", "_")

    def pieces(self) -> int:
        """Images out of domain."""
        return round(self.size * self.outside)

    def per_class(self) -> NDArray[np.int64]:
        """Images of each digit, (10,), in all `size` − `pieces()`."""
        shares = np.empty(CLASSES)
        shares[permutation(CLASSES, self.draw, "variant", "classes")] = self.imbalance ** -np.linspace(0, 1, CLASSES)
        exact = shares / shares.sum() * (self.size - self.pieces())
        counts = np.floor(exact).astype(np.int64)
        left = self.size - self.pieces() - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:left]] += 1  # the largest remainders
        return counts


def write_variant(folder: Path, variant: PoolVariant) -> str:
    """Write the pool, and beside it a manifest; returns the data set's name in that data folder.

    The files are a pure function of the variant, and each appears whole or not at all.

    Raises:
        UsageError: the embedded pool has too few images of some kind.
        RunError: the files cannot be written.
    """
    chosen = list(_chosen(variant))
    order = permutation(len(chosen), variant.draw, "variant", "order")
    write_images(folder / f"{variant.name}.parquet", (chosen[i] for i in order), None)
    write_manifest(folder / f"{variant.name}.yaml", _manifest(variant))
    return variant.name


def _chosen(variant: PoolVariant) -> Iterator[Row]:
    """The first so many images of each kind, in an order that depends on the draw."""
    wanted = {NO_LABEL: variant.pieces()} | dict(enumerate(variant.per_class().tolist()))
    kinds: dict[int, list[Sample]] = {kind: [] for kind in wanted}
    manifest = load_manifest(DIGITS)
    count = manifest.splits["labelled"].draw
    assert count is not None
    labelled = {sample.key for _, sample in stratified(open_split(manifest, "labelled"), count, variant.draw).read()}
    for subset in ("train", "photographs"):
        for shard in digits_shards(subset, with_labels=True):
            for sample in shard.read():
                if sample.key not in labelled:
                    kinds[sample.label].append(sample)
    for kind, count in wanted.items():
        samples = kinds[kind]
        if count > len(samples):
            what = "pieces of photographs" if kind == NO_LABEL else f"images of class {kind}"
            raise UsageError(
                f"{variant} needs {count} {what} and the embedded pool has {len(samples)}, none of which is used "
                "twice; choose a smaller size"
            )
        for row in permutation(len(samples), variant.draw, "variant", kind)[:count]:
            yield Row(samples[row].key, samples[row].data, NO_LABEL)


def _manifest(variant: PoolVariant) -> Manifest:
    """That of `digits-draws` with another pool; labelled, validation and test are its own, embedded files."""
    digits = load_manifest(DIGITS)
    pool = FileSpec(path=f"{variant.name}.parquet", reader="parquet", rows=variant.size)
    counts = ", ".join(map(str, variant.per_class().tolist()))
    return digits.model_copy(
        update={
            "name": variant.name,
            "files": {**digits.files, "pool": pool},
            "splits": {**digits.splits, "unlabelled": SplitSpec.model_validate({"from": "pool"})},
            "notes": f"Pool: {variant.pieces()} pieces of photographs; digits 0 to 9: {counts}.",
        }
    )
