"""Many devices and many processes: the mesh, shardings that follow from shapes, `jax.distributed`, pmap."""
