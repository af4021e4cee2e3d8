"""The command line, `lcm-jax`."""
