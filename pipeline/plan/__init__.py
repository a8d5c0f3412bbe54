"""What a training would need of a cluster, before it is begun: memory, layout and time. See docs/plan.md."""
