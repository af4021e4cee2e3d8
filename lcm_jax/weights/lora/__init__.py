"""LoRA files in the formats of PEFT, diffusers and kohya: reading and writing."""
