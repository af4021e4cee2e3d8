"""A web application around `lcm_jax.stream`: the page, its server, and the service behind it."""
