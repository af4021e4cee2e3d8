"""Single-file checkpoints in the naming of LDM, SGM and SD3: reading and writing."""
