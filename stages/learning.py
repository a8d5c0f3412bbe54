"""To be removed: old names of the data of a stage."""

from typing import Any

from pipeline.models import require_classes as check_classes
from pipeline.models import to_device

__all__ = ["check_classes", "load_split", "manifest_of", "split_of", "to_device"]


def manifest_of(context: Any) -> Any:
    return context.data_set.manifest


def split_of(context: Any, name: Any) -> Any:
    return context.data_set.split(name)


def load_split(context: Any, split: Any, size: int | None = None) -> Any:
    return context.data_set.images(split, size)
