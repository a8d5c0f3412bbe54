"""The store of the teacher's distributions: self-contained training shards, checked before use.

Made by `build` (through spill files, `spill`), opened by `store`, read in turn by `stream`. What lies in targets/ is
described in `files`; `_manifest.json`, with version, counts, checksums, class names, teacher and preprocessing, is
written last: a folder without it is no store. The folder may lie in object storage.
"""

from pipeline.targets.store import LabelledTargets, StoredBatch, TargetsStore

__all__ = ["LabelledTargets", "StoredBatch", "TargetsStore"]
