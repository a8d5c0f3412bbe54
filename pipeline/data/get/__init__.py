"""Getting data: downloads, imports, checks."""
