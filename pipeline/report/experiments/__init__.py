"""Tables and figures of experiments."""
