"""The tasks that can be trained: each is a config of a few fields, whose `build()` returns the loop's `Task`."""
