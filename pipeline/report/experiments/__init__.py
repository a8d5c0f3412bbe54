"""Experiments over seeds: results by name, statistics, and one way to write them as Markdown, CSV, JSON and figures."""
