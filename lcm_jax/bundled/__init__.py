"""The bundled models: package data, found by `lcm_jax.weights.hub`."""
