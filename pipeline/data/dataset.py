"""The data set of a recipe: its splits, opened, and decoded to the recipe's size."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.classes import SHOWN
from pipeline.config import DataSettings
from pipeline.data.decode import WHOLE, Framing, default_workers
from pipeline.data.decoded import Images, load_images
from pipeline.data.draw import stratified, without
from pipeline.data.manifest import Manifest, SplitName, load_manifest
from pipeline.data.readers.shard import Sample
from pipeline.data.sources import Split, open_split
from pipeline.distributed.launch import processes_here
from pipeline.storage.files import Location, fingerprint


@dataclass(frozen=True)
class DataSet:
    """Images of a recipe.

    Attributes:
        settings: which, and how large.
        folder: the data folder, or None for what is embedded.
        scratch: gets what does not fit into `settings.memory_gib`, decoded.
        note: told what could not be used.
        seed: of the draw of `settings.labelled` images.
    """

    settings: DataSettings
    folder: Location | None
    scratch: Path
    note: Callable[[str], None] = lambda text: None
    seed: int = 0

    @property
    def manifest(self) -> Manifest:
        """What the data set consists of."""
        return load_manifest(self.settings.manifest, self.folder)

    def split(self, name: SplitName) -> Split:
        """A split; the labelled one as the recipe draws it, the pool without it where the manifest says so."""
        split = open_split(self.manifest, name, self.folder)
        if name == "unlabelled" and self.manifest.splits["unlabelled"].without:
            return without(split, self.split("labelled"))
        if name == "labelled" and self.drawn is not None:
            return stratified(split, self.drawn, self.seed)
        return split

    @property
    def drawn(self) -> int | None:
        """Labelled images that the seed draws, by the recipe or the manifest; None: all are used, by every seed."""
        labelled = self.manifest.splits.get("labelled")
        return self.settings.labelled or (labelled.draw if labelled else None)

    def images(self, split: Split, size: int | None = None, framing: Framing = WHOLE) -> Images:
        """Decode a split; what did not decode is told."""
        images = self.decoded(split.read(), split.name, split.fingerprint(), size, framing)
        if images.skipped:
            first = images.skipped[0]
            self.note(
                f"{split.name}: {len(images.skipped)} of {split.count()} images cannot be used "
                f"(first: {first.shard} row {first.row}, {first.key}: {first.status}, {first.detail})"
            )
        if split.labelled and (absent := sorted(set(range(len(split.class_names))) - set(images.labels.tolist()))):
            names = [split.class_names[label] for label in absent]
            self.note(f"{split.name}: no image of {len(names)} classes: {', '.join(names[:SHOWN])}")
        return images

    def decoded(
        self,
        samples: Iterable[tuple[str, Sample]],
        name: str,
        identity: str,
        size: int | None = None,
        framing: Framing = WHOLE,
    ) -> Images:
        """Decode to the recipe's size, or another; beyond `memory_gib` into a file that all processes share.

        `identity` changes when the samples do.
        """
        size = size or self.settings.image_size
        shown = [identity, size] if framing == WHOLE else [identity, size, asdict(framing)]
        return load_images(
            samples,
            size,
            place=self.scratch / f"{name}-{fingerprint(shown)[:16]}",
            memory_limit=int(self.settings.memory_gib * 2**30) // processes_here(),
            workers=default_workers(size),
            framing=framing,
        )
