"""One reader per format; `shard` is what they have in common."""
