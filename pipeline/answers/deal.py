"""Answers, in the order of a split's images, into the files of its shards."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.answers.join import SplitIndex
from pipeline.answers.store import ANSWERS, answers_fingerprint, answers_path, answers_schema, group_rows, is_imported
from pipeline.data.readers.shard import Shard
from pipeline.storage.files import Location, whole_file
from pipeline.storage.tables import fixed_binary, table_writer


class OutOfOrder(Exception):
    """Answers do not come in the order of the images."""


class Deal:
    """Writes answers, which come in the order of the split, to the files of its shards."""

    def __init__(
        self,
        folder: Location,
        split: str,
        shards: Sequence[Shard],
        index: SplitIndex,
        names: tuple[str, ...],
        fingerprint: str,
        embedding: int = 0,
    ) -> None:
        self.folder, self.split, self.shards, self.index = folder, split, shards, index
        self.names, self.fingerprint, self.embedding = names, fingerprint, embedding
        self._anew = False
        self._begin()

    def restart(self) -> None:
        """Begin again with the first shard, and write all anew: of what was written, rows may be missing."""
        self._anew = True
        self.abandon()
        self._begin()

    def _begin(self) -> None:
        self._next = 0  # shard
        self._answered = 0
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def add(self, ordinals: NDArray[np.int64], p: NDArray[np.float32]) -> None:
        """Take in the answers of images (m,), increasing, after all before: distributions, embeddings, (m, C_T + E)."""
        self._answered += len(ordinals)
        while len(ordinals):
            end = int(self.index.offsets[self._next + 1])
            mine = int(np.searchsorted(ordinals, end))
            if mine:
                self._write(ordinals[:mine], p[:mine])
            ordinals, p = ordinals[mine:], p[mine:]
            if len(ordinals):
                self._finish()

    def close(self) -> int:
        """Finish the last file, and those of shards without an answer; how many images have one."""
        while self._next < len(self.shards):
            self._finish()
        return self._answered

    def abandon(self) -> None:
        """Leave no half-written file."""
        self._open.pop_all().__exit__(OutOfOrder, OutOfOrder(), None)

    @property
    def _is_done(self) -> bool:
        shard = self.shards[self._next]
        return not self._anew and is_imported(self.folder, self.split, shard, self.fingerprint)

    def _write(self, ordinals: NDArray[np.int64], p: NDArray[np.float32]) -> None:
        """Append to the file of the present shard, which begins with its first answer."""
        if self._writer is None:
            if self._is_done:
                return
            self._start()
        if self._writer is not None:
            classes = len(self.names)
            columns = [p] if not self.embedding else [np.ascontiguousarray(p[:, :classes]), p[:, classes:].copy()]
            table = pa.table([self.index.rows[ordinals], *map(fixed_binary, columns)], schema=self._writer.schema)
            self._writer.write_table(table, row_group_size=group_rows(len(self.names)))

    def _start(self) -> None:
        shard = self.shards[self._next]
        notes = {
            "shard": shard.name,
            "fingerprint": answers_fingerprint(shard, self.fingerprint),
            "class_names": list(self.names),
        }
        temporary = self._open.enter_context(whole_file(answers_path(self.folder, self.split, shard.name)))
        writer = table_writer(temporary, ANSWERS, answers_schema(len(self.names), self.embedding), notes)
        self._writer = self._open.enter_context(writer)

    def _finish(self) -> None:
        """The file of the present shard is whole; the next one's turn."""
        if self._writer is None and not self._is_done:
            self._start()  # without a row
        self._open.close()
        self._writer, self._next = None, self._next + 1
