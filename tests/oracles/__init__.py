"""Independent implementations to compare against, written from the papers' equations alone."""
