"""Exact streaming top-K per class."""

from pipeline.pool.select.top_k import Assign, Selection, checked_assign, checked_k, select_top_k, upsample

__all__ = ["Assign", "Selection", "checked_assign", "checked_k", "select_top_k", "upsample"]
