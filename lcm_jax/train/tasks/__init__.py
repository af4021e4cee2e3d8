"""What can be trained. A task config says it in a few fields; `build()` gives the loop its `Task`."""
