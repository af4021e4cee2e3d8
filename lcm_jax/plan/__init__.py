"""Plans of a training step for a machine that is not present: memory, FLOPs, collectives and estimated time."""
