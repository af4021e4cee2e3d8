"""Text encoders (and later the MMDiT): text -> embeddings -> velocity. Imports neither vae16 nor lcm_jax."""
