"""The unlabelled pool: score it, find copies, select from it (arXiv:2003.10580v1, section 3.2)."""
