"""Training: a task, a loop, a step. Everything that learns in this library goes through `loop.fit`."""
