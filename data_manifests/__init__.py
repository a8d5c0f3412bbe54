"""One YAML file per data set: its files, reader, splits, licence and, where there is one, the paper's row."""
