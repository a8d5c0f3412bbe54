"""Copies of evaluation images in a pool."""
