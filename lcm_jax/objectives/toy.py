"""The smallest network, parameter trees and batch that an objective takes: for examples, and for tests of your own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.typing import Array, Cond, Image, Nets, Params, Time


def toy_network(params: Params, x: Image, t: Time, cond: Cond) -> Image:
    """Return params * x + mean(context) + 0.1 (sin w + sin span) + 1e-4 t; w and the span may be absent.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.toy import toy_network
    >>> toy_network(jnp.float32(2.0), jnp.ones((1, 1, 1, 1)), 0.0, {"context": jnp.zeros((1, 1, 4))}).item()
    2.0
    """
    extra = sum(jnp.sin(cond[name].reshape(len(x), -1).sum(1)) for name in ("guidance", "span") if name in cond)
    shift = cond["context"].mean((1, 2)) + 0.1 * extra
    return params * x + shift[:, None, None, None] + 1e-4 * jnp.asarray(t).reshape(-1, 1, 1, 1)


def toy_discriminator(heads: Params, base: Params, x: Image, t: Time, cond: Cond) -> Float[Array, "b k"]:
    """Return the logits heads * (mean(x) + base), one for each channel.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.toy import toy_discriminator
    >>> toy_discriminator(jnp.float32(0.5), jnp.float32(1.0), jnp.ones((2, 4, 4, 3)), 0.0, {}).shape
    (2, 3)
    """
    return heads * (x.mean((1, 2)) + base)


def toy_nets(student: float = 0.5, teacher: float = 0.4) -> Nets:
    """Return the trees of `toy_network` with every part that any objective asks for.

    >>> from lcm_jax.objectives import toy_nets
    >>> nets = toy_nets()
    >>> float(nets.student), sorted(nets.others)
    (0.5, ['fake', 'heads', 'weight'])
    """
    trained, fixed = jnp.float32(student), jnp.float32(teacher)
    others = {"fake": fixed, "heads": jnp.float32(0.1), "weight": jnp.zeros(9)}
    return Nets(
        toy_network,
        student=trained,
        target=trained,
        teacher=fixed,
        null={"context": jnp.zeros((1, 2, 4))},
        others=others,
        critic=toy_discriminator,
    )


def toy_batch(n: int = 2) -> dict[str, Any]:
    """Return a batch of n random latents of 4 x 4 x 4 with their conditioning.

    >>> from lcm_jax.objectives import toy_batch
    >>> batch = toy_batch()
    >>> batch["x0"].shape, batch["cond"]["context"].shape
    ((2, 4, 4, 4), (2, 2, 4))
    """
    keys = jax.random.split(jax.random.key(0))
    x0, context = jax.random.normal(keys[0], (n, 4, 4, 4)), jax.random.normal(keys[1], (n, 2, 4))
    return {"x0": x0, "cond": {"context": context}}
