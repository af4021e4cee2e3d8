"""The terms that all objectives are built of: distances, dropout of the conditioning, the split of a loss over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from lcm_jax.diffusion.parameterization import expand
from lcm_jax.typing import Array, Cond, Key
from mmdit.attention import forward_mode

Distance = Literal["l2", "huber", "huber_whole"]


def check_choice(name: str, value: object, allowed: object) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal `allowed`.

    >>> from lcm_jax.objectives.terms import Distance, check_choice
    >>> check_choice("loss", "l1", Distance)
    Traceback (most recent call last):
    ValueError: loss='l1' is unknown; use one of l2, huber, huber_whole
    """
    if value not in get_args(allowed):
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}")


def distance(kind: Distance, difference: Float[Array, "b ..."], c: float = 1e-3) -> Float[Array, " b"]:
    """Return the mean distance over the elements of each example, in float32.

    "l2": d^2. "huber": the pseudo-Huber sqrt(d^2 + c^2) - c of each element, as in the released LCM code.
    "huber_whole": that of the example's root mean square, which is Song & Dhariwal's (2310.14189, sec. 3.3) of its norm
    divided by sqrt(n); their c = 0.00054 sqrt(n) is c = 0.00054 here.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import distance
    >>> difference = jnp.full((1, 2, 2, 1), 2.0)
    >>> distance("l2", difference).tolist(), distance("huber", difference, 0.0).tolist()
    ([4.0], [2.0])
    """
    d = difference.astype(jnp.float32)
    square = jnp.square(d).reshape(d.shape[0], -1)
    if kind == "huber_whole":
        square = jnp.mean(square, axis=1, keepdims=True)
    # d^2 / (sqrt(d^2 + c^2) + c) is the same without the cancellation
    return jnp.mean(square if kind == "l2" else square / (jnp.sqrt(square + c * c) + c), axis=1)


def without_caption(null: Cond | None, cond: Cond) -> Cond:
    """Return `cond` with the leaves of the empty prompt (batch 1, broadcast) in place of its own.

    A leaf that `null` lacks stays the example's: SDXL's time_ids describe the picture, not the caption. ValueError
    where `null` has a leaf that `cond` lacks.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import without_caption
    >>> cond = {"context": jnp.ones((2, 1, 4)), "time_ids": jnp.ones((2, 6))}
    >>> empty = without_caption({"context": jnp.zeros((1, 1, 4))}, cond)
    >>> float(empty["context"].max()), float(empty["time_ids"].min())
    (0.0, 1.0)
    """
    if not null or not set(null) <= set(cond):
        raise ValueError(
            f"nets.null has the leaves {sorted(null or ())}, batch['cond'] {sorted(cond)}: encode both alike"
        )
    rows = {k: jnp.broadcast_to(v, (cond[k].shape[0], *v.shape[1:])).astype(cond[k].dtype) for k, v in null.items()}
    return {**cond, **rows}


def drop_captions(key: Key, cond: Cond, null: Cond | None, rate: float) -> Cond:
    """Replace each example's conditioning, all leaves together, by that of the empty prompt with probability `rate`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import drop_captions
    >>> cond, null = {"context": jnp.ones((2, 1, 4))}, {"context": jnp.zeros((1, 1, 4))}
    >>> float(drop_captions(jax.random.key(0), cond, null, 1.0)["context"].max())
    0.0
    """
    if rate == 0.0:
        return cond
    return replace_captions(jax.random.bernoulli(key, rate, next(iter(cond.values())).shape[:1]), cond, null)


def replace_captions(dropped: Bool[Array, " b"], cond: Cond, null: Cond | None) -> Cond:
    """Return `cond` with that of the empty prompt for the examples that are `dropped`.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import replace_captions
    >>> cond, null = {"context": jnp.ones((2, 1, 4))}, {"context": jnp.zeros((1, 1, 4))}
    >>> replace_captions(jnp.array([True, False]), cond, null)["context"].mean((1, 2)).tolist()
    [0.0, 1.0]
    """
    empty = without_caption(null, cond)
    return {k: jnp.where(expand(dropped, leaf), empty[k], leaf) for k, leaf in cond.items()}


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """The part of SD3's conditioning that each text encoder made (2403.03206, section 4; mmdit.text.sd3).

    The first clip_tokens tokens of "context" hold CLIP i in the i-th run of clip_widths channels, the rest are T5's.
    "pooled" holds CLIP i in the i-th run of pooled_widths channels. The defaults are SD3-medium's. ValueError unless
    both name as many CLIPs.

    >>> from lcm_jax.objectives import TextEncoders
    >>> sum(TextEncoders().pooled_widths)
    2048
    """

    clip_tokens: int = 77
    clip_widths: tuple[int, ...] = (768, 1280)
    pooled_widths: tuple[int, ...] = (768, 1280)

    def __post_init__(self) -> None:
        if not self.clip_widths or len(self.clip_widths) != len(self.pooled_widths):
            raise ValueError(
                f"clip_widths {self.clip_widths} and pooled_widths {self.pooled_widths} must name the same CLIPs"
            )

    def check(self, cond: Cond) -> None:
        """Raise ValueError unless this is the layout of `cond`."""
        if not {"context", "pooled"} <= set(cond):
            raise ValueError(
                f"encoder dropout needs the leaves context and pooled, the conditioning has {sorted(cond)}"
            )
        tokens, width = cond["context"].shape[1:]
        pooled = cond["pooled"].shape[-1]
        if self.clip_tokens > tokens or sum(self.clip_widths) > width or sum(self.pooled_widths) != pooled:
            raise ValueError(
                f"{self} does not fit a context of {tokens} tokens and {width} channels with {pooled} pooled channels"
            )


def drop_encoders(key: Key, cond: Cond, encoders: TextEncoders, rate: float) -> Cond:
    """Zero each text encoder's part of each example's conditioning with probability `rate`, independently.

    SD3 has a rate of 46.4 %, so that all three are gone for 0.464^3 = 10 % of the examples. ValueError as
    `TextEncoders.check_choice` says.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import TextEncoders, drop_encoders
    >>> layout = TextEncoders(clip_tokens=2, clip_widths=(3,), pooled_widths=(3,))
    >>> cond = {"context": jnp.ones((1, 4, 5)), "pooled": jnp.ones((1, 3))}
    >>> dropped = drop_encoders(jax.random.key(0), cond, layout, 1.0)
    >>> float(dropped["context"].max()), float(dropped["pooled"].max())
    (0.0, 0.0)
    """
    encoders.check(cond)
    context, pooled = cond["context"], cond["pooled"]
    clips = len(encoders.clip_widths)
    keep = jax.random.bernoulli(key, 1.0 - rate, (len(context), clips + 1))
    # an encoder's number for each pooled channel, each channel of the CLIPs' tokens and each token; T5's is the last
    of_pooled = np.repeat(np.arange(clips), encoders.pooled_widths)
    of_channel = np.repeat(np.arange(clips), encoders.clip_widths)
    of_channel = np.pad(of_channel, (0, context.shape[2] - len(of_channel)), mode="edge")  # there are zeros to fill up
    is_clip = (np.arange(context.shape[1]) < encoders.clip_tokens)[None, :, None]
    keep_context = jnp.where(is_clip, keep[:, None, of_channel], keep[:, None, -1:])
    return {
        **cond,
        "context": jnp.where(keep_context, context, 0.0),
        "pooled": jnp.where(keep[:, of_pooled], pooled, 0.0),
    }


def by_quarter(values: Float[Array, " b"], position: Float[Array, " b"]) -> dict[str, Float[Array, ""]]:
    """Split a mean over the four quarters of time: loss_t1 (clean) ... loss_t4 (noise), which average to the mean.

    `position` is time scaled to [0, 1]. Each entry is 4 mean(values [t in quarter]): no division by a count, so it is
    finite for any batch, averages rightly over steps and devices, and for uniform times estimates the quarter's mean.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import by_quarter
    >>> {name: float(value) for name, value in by_quarter(jnp.array([1.0, 3.0]), jnp.array([0.1, 0.9])).items()}
    {'loss_t1': 2.0, 'loss_t2': 0.0, 'loss_t3': 0.0, 'loss_t4': 6.0}
    """
    quarter = jnp.clip(jnp.ceil(position * 4) - 1, 0, 3)
    return {f"loss_t{i + 1}": 4 * jnp.mean(jnp.where(quarter == i, values, 0.0)) for i in range(4)}


def hinge(real: Float[Array, "b k"], fake: Float[Array, "b k"]) -> Float[Array, ""]:
    """Return a discriminator's hinge loss, mean max(0, 1 - real) + mean max(0, 1 + fake) (2311.17042 eq. 3).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import hinge
    >>> float(hinge(jnp.array([[2.0]]), jnp.array([[0.5]])))
    1.5
    """
    return jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake))


def frozen(tree: Any) -> Any:
    """Return the tree without gradient (`jax.lax.stop_gradient` of every leaf).

    >>> import jax
    >>> from lcm_jax.objectives.terms import frozen
    >>> float(jax.grad(lambda x: x * frozen(x))(3.0))
    3.0
    """
    return jax.tree.map(jax.lax.stop_gradient, tree)


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return `jax.jvp`: the value of a function of networks and its derivative along the tangents, without gradient.

    Their attention is computed by kernels that have a forward mode, which flash attention's usual ones have not.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.terms import jvp
    >>> [float(y) for y in jvp(jnp.square, (3.0,), (1.0,))]
    [9.0, 6.0]
    """
    with forward_mode(frozen=True):
        value, derivative = jax.jvp(function, primals, tangents)
    return value, frozen(derivative)
