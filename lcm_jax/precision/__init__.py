"""The precision of a network's matrix products and convolutions: bfloat16 on CPUs, int8, fp8."""
