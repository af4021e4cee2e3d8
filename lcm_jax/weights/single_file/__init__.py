"""Single-file checkpoints (LDM, SGM, SD3)."""
