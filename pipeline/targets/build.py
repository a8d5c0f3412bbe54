"""Make the store of distributions: join selection, scores and image bytes; shuffle once; write.

Two steps, each resumable by file: every shard of the pool is read once, in order, and its selected
images are dealt to the training shards in a spill file; then each training shard gathers its share
from all spill files. A worker has at most one shard of the pool, or one training shard, in memory.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.correction import Correction
from pipeline.data.readers.shard import Sample, Shard
from pipeline.errors import DataError, RunError
from pipeline.pool.answered import POOL
from pipeline.pool.infer import Source, infer_distributions
from pipeline.pool.scores import ScoredPool
from pipeline.pool.selection import SelectionFile
from pipeline.seeds import permutation
from pipeline.storage.files import Location, discard, names_in, remove_leftovers
from pipeline.storage.ours import remove_ours
from pipeline.storage.tables import fixed_binary, read_header
from pipeline.storage.workers import EngineSettings, run_all
from pipeline.targets.embedding import (
    REDUCTION_FILE,
    SAMPLE,
    Embedder,
    Embedding,
    Reduction,
    embedding_column,
    read_reduction,
)
from pipeline.targets.files import (
    ITEM,
    TARGETS,
    Dtype,
    file_is_done,
    labelled_schema,
    pool_path,
    remove_unfinished,
    require_ours,
    write_targets,
)
from pipeline.targets.manifest import MANIFEST, Origin, StoreSettings, store_fingerprint, write_manifest
from pipeline.targets.spill import SPILL, Deal, Gather, Shuffle
from pipeline.targets.store import TargetsStore

Answers = Callable[[Sequence[tuple[str, Sample]]], tuple[NDArray[Any], NDArray[np.intp]]]
LABELLED_ROWS = 1 << 16  # labelled images of one file


@dataclass(frozen=True, eq=False)
class Ingredients:
    """What the store is made from.

    Attributes:
        selection: from `read_selection`.
        shards: of the pool.
        labelled: (shard name, sample) of the labelled split, in order.
        scorer: the teacher.
        scores: the scores that the selection was made from, whose distributions are stored; None when
            the teacher is another one, and then its distributions are inferred here.
        here: the teacher for the labelled images, which this process infers; `scorer` unless given.
        correction: from the teacher's classes to the selection's; None: they are the same.
        answers: gives distributions (m, C_T) of some labelled images, and their places (m,); None: `here` infers them.
        stored_answers: whether they are predictions, and may be there for some of the labelled images alone.
        embedder: gives what is stored of each image beside its distribution; None: nothing.
    """

    selection: SelectionFile
    shards: Sequence[Shard]
    labelled: Iterable[tuple[str, Sample]]
    scorer: Source
    scores: ScoredPool | None
    here: Source | None = None
    correction: Correction | None = None
    answers: Answers | None = None
    stored_answers: bool = False
    embedder: Embedder | None = None

    def require_agreement(self) -> None:
        """Refuse what does not belong together.

        Raises:
            DataError: the selection was made from other scores, or the teacher has other classes.
        """
        selected, known = self.selection.class_names, self.scorer.class_names
        if self.scores is not None and self.scores.fingerprint() != self.selection.scores:
            raise DataError("the selection was made from other scores than these; run `mpl filter` again")
        if self.correction is not None:
            known = self.correction.class_names if known == self.correction.teacher_names else known
        if selected != known:
            raise DataError(
                f"the selection has the classes {', '.join(selected[:5])}… ({len(selected)}), "
                f"the teacher {', '.join(known[:5])}… ({len(known)})"
            )


class Runner(Protocol):
    """Has all items done by an engine; `name` is for people."""

    def __call__(
        self,
        work: Callable[[int, Callable[[int], None]], int],
        items: Sequence[int],
        *,
        name: Callable[[int], str],
    ) -> object: ...


def run_here(
    work: Callable[[int, Callable[[int], None]], int],
    items: Sequence[int],
    *,
    name: Callable[[int], str],
) -> None:
    """The simplest runner: in this process, one after the other."""
    run_all(EngineSettings(), work, items, name=name, progress=lambda count: None, done=lambda item, count: None)


def precompute(
    folder: Location,
    ingredients: Ingredients,
    settings: StoreSettings,
    *,
    preprocessing: dict[str, Any],
    run: Runner = run_here,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write targets/ and return its manifest. Killed and started again, it goes on by the file.

    Args:
        folder: targets/.
        ingredients: see there.
        settings: see there.
        preprocessing: told in the manifest.
        run: does the shards, here or in workers.
        tell: told the size to expect.

    Raises:
        DataError: the selection was made from other scores or names shards or rows that are not there.
        RunError: too little free disk, or a file cannot be written.
    """
    ingredients.require_agreement()
    shuffle = Shuffle(
        folder, settings, ingredients.selection, ingredients.shards, ingredients.scorer, ingredients.scores
    )
    require_ours(folder)
    discard(folder / MANIFEST)  # unfinished from here on
    remove_leftovers(folder, folder / SPILL)
    remove_unfinished(folder, shuffle.fingerprint, settings.format)
    left = shuffle.files_left()
    if len(left) == shuffle.files and not names_in(folder / SPILL):  # nothing is there yet
        shuffle.require_disk(tell)
    embedding = embedding_of(ingredients, settings, shuffle)
    if left:
        _write_pool(shuffle, left, embedding, run)
    skipped = write_labelled(folder, ingredients, settings, embedding)
    stored = sum(read_header(pool_path(folder, file), TARGETS).rows for file in range(shuffle.files))
    if stored != len(shuffle.images.row):
        raise RunError(
            f"{folder} has {stored:,} of {len(shuffle.images.row):,} selected images; run mpl precompute --force"
        )
    remove_ours(folder / SPILL)
    remove_leftovers(folder)  # of workers that died
    return write_manifest(
        folder,
        Origin(
            shuffle.fingerprint,
            settings.teacher,
            ingredients.scorer.class_names,
            settings.dtype,
            preprocessing,
            ingredients.correction,
        ),
        {
            "uses": int(shuffle.images.repeat.sum()),
            "labelled_skipped": skipped,
            "inferred": ingredients.scores is None,
            **({} if embedding is None else {"embedding": embedding.reduction.numbers}),
            **({"stored_answers": True} if ingredients.stored_answers else {}),
        },
    )


def embedding_of(ingredients: Ingredients, settings: StoreSettings, shuffle: Shuffle) -> Embedding | None:
    """What is stored beside distributions, reduced as a sample of the selected images says; None: nothing.

    The reduction is kept in the store: what goes on after a kill has the same one.

    Raises:
        DataError: images have no embedding, or all have the same.
    """
    embedder = ingredients.embedder
    if embedder is None or settings.embedding is None:
        return None
    path = shuffle.folder / REDUCTION_FILE
    reduction = read_reduction(path, shuffle.fingerprint)
    if reduction is None:
        raw = [embedder.embed(POOL, shard, samples) for shard, samples in shuffle.sampled(SAMPLE)]
        reduction = Reduction.fit(np.concatenate(raw), settings.embedding)
        reduction.save(path, shuffle.fingerprint)
    return Embedding(embedder, reduction)


def _write_pool(shuffle: Shuffle, left: Sequence[int], embedding: Embedding | None, run: Runner) -> None:
    """Deal the images of all shards, then gather the training shards that are left."""
    shuffle.embedding = embedding
    run(Deal(shuffle), np.unique(shuffle.images.shard).tolist(), name=lambda number: shuffle.shards[number].name)
    shuffle.scorer = shuffle.scorer.without_weights()  # its work is done
    shuffle.embedding = None if embedding is None else embedding.without_weights()
    run(Gather(shuffle), left, name=lambda file: f"training shard {file}")


def write_labelled(
    folder: Location, ingredients: Ingredients, settings: StoreSettings, embedding: Embedding | None = None
) -> int:
    """Write targets/labelled-*.parquet; how many images gave no distribution and were left out."""
    mark = store_fingerprint(ingredients.selection, settings)
    stream, file, skipped = iter(ingredients.labelled), 0, 0
    while group := list(islice(stream, LABELLED_ROWS)):
        path = folder / f"labelled-{file:05d}.parquet"
        if not file_is_done(path, mark):
            write_targets(path, _labelled_table(group, ingredients, settings.dtype, embedding), mark)
        file, skipped = file + 1, skipped + len(group) - read_header(path, TARGETS).rows
    return skipped


def _labelled_table(
    group: Sequence[tuple[str, Sample]], ingredients: Ingredients, dtype: Dtype, embedding: Embedding | None
) -> pa.Table:
    scorer = ingredients.here or ingredients.scorer
    if ingredients.answers is None:
        inferred, good = infer_distributions([sample for _, sample in group], scorer)
    else:
        inferred, good = ingredients.answers(group)
    images = [group[place] for place in good]
    by_shard = [(shard, [sample for _, sample in part]) for shard, part in groupby(images, key=lambda image: image[0])]
    columns = [embedding_column(embedding, "labelled", *part) for part in by_shard or [("", [])]]
    more = {name: pa.concat_arrays([column[name] for column in columns]) for name in columns[0]}
    numbers = 0 if embedding is None else embedding.reduction.numbers
    return pa.table(
        {
            "key": [sample.key for _, sample in images],
            "shard": [shard for shard, _ in images],
            "row": [sample.row for _, sample in images],
            "label": [sample.label for _, sample in images],
            "distribution": fixed_binary(inferred.astype(ITEM[dtype])),
            **more,
        },
        labelled_schema(len(scorer.class_names), dtype, numbers),
    )


def check_targets(store: TargetsStore, scorer: Source, n: int, seed: int = 0) -> float:
    """Infer n stored rows again: the largest difference of a probability from the stored one.

    Args:
        store: the store.
        scorer: its teacher.
        n: rows, drawn at random; all of them if there are fewer.
        seed: of the draw.
    """
    drawn = np.sort(permutation(store.count, seed, "check")[:n])
    largest, begin = 0.0, 0
    for batch in store.batches():
        places = drawn[(drawn >= begin) & (drawn < begin + len(batch.samples))] - begin
        begin += len(batch.samples)
        if len(places):
            inferred, good = infer_distributions([batch.samples[place][1] for place in places], scorer)
            if len(good) < len(places):
                return float("inf")
            largest = max(largest, float(np.abs(inferred - batch.distributions[places]).max()))
    return largest
