"""Reduced Meta Pseudo Labels (arXiv:2003.10580): the library. No command line, no printing."""

__version__ = "0.1.0"
