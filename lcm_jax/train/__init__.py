"""Training: a task, a loop and a step. Every network that this library trains is trained by `loop.fit`."""
