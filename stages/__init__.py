"""The command line: one click command per file; each parses, plans, calls `pipeline`, and records."""
