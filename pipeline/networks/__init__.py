"""Networks: timm's and ours by name, in files of any kind, and their classes by name."""
