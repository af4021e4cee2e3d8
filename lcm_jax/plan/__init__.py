"""What a training step takes on a machine that is not there: memory, FLOPs, collectives, an estimate of its time."""
