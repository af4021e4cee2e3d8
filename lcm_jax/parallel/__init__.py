"""Many devices and many processes: the mesh, shardings derived from shapes, `jax.distributed`, and pmap."""
