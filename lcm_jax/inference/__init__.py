"""From a prompt to pictures: `Pipeline`, and programs compiled ahead of time."""
