"""The images of a data set for a person's own program: to ask a model, or people, about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.decode import decode_stream, default_workers
from pipeline.data.manifest import Manifest, SplitName, load_manifest, own_manifest
from pipeline.data.sources import class_names, open_split
from pipeline.storage.files import Location


@dataclass(frozen=True)
class OpenDataSet:
    """A data set, opened.

    Attributes:
        manifest: what it consists of.
        folder: where its files lie; None for what is embedded.
    """

    manifest: Manifest
    folder: Location | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return class_names(self.manifest, self.folder)

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Of labelled, validation, unlabelled and test those that there are."""
        return tuple(self.manifest.splits)

    def images(self, split: SplitName, size: int | None = None) -> Iterator[tuple[str, Image.Image]]:
        """(key, RGB picture of `size` × `size` pixels, its centre) of the images of a split that decode, in order.

        Args:
            split: its name.
            size: by default that of the stored images.

        Raises:
            DataError: there is no such split, or its files cannot be read.
        """
        side = size or self.manifest.image.size
        samples = (sample for _, sample in open_split(self.manifest, split, self.folder).read())
        workers = default_workers(side)
        for sample, pixels, _, _ in decode_stream(samples, side, workers, data_of=lambda sample: sample.data):
            if pixels is not None:
                yield sample.key, Image.fromarray(pixels)


def load_data_set(name_or_folder: str | Path, data: Location | None = None) -> OpenDataSet:
    """Open a data set: by its name, or the folder that `mpl data import` made.

    Raises:
        DataError: there is none.
    """
    folder = Path(name_or_folder)
    if data is None and (folder / "manifest.yaml").is_file() and (own := own_manifest(folder)) is not None:
        return OpenDataSet(own, folder)
    return OpenDataSet(load_manifest(name_or_folder, data), data)
