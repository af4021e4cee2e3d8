"""LoRA files in PEFT, diffusers and kohya form."""
