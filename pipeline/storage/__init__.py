"""What lies on disk or in object storage: files, tables, runs, metrics, and the workers that write them."""
