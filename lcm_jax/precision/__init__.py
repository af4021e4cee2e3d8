"""The precision in which a network multiplies: bfloat16 on CPUs, int8, fp8."""
