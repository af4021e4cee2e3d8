"""The MMDiT of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mmdit.attention import Implementation
from mmdit.blocks import (
    JointBlock,
    Modulation,
    Remat,
    dense,
    modulate,
    normalize,
    rematerialized,
    stacked,
)
from mmdit.config import MMDiTConfig
from mmdit.embed import PatchEmbed, TimeTextEmbed, unpatchify


class MMDiT(nn.Module):
    """(noisy latent, time, conditioning) -> raw output (b, h, w, out_channels), in the precision of the latent.

    scan: stack every run of blocks that are built alike (all but the last; in SD3.5-medium the dual ones, then the
    others), so that one of each run is compiled; their parameters are stacked too.
    remat: recompute the inside of a block in the backward pass instead of storing it; or the name of a policy of
    jax.checkpoint_policies, which says what is stored all the same.
    dtype: of the computation; norms, softmax and the time embedding stay float32. param_dtype: of new parameters.
    attention: the kernel; None chooses by platform and precision.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: Remat = False
    attention: Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Shaped[Array, "*b"],
        cond: Mapping[str, Array],
        skip_layers: tuple[int, ...] = (),
    ) -> Float[Array, "b h w o"]:
        """t: scalar or (b,), 1000 times the time of the rectified flow, 0..1000. cond: "context" (b, l, d) and
        "pooled" (b, p); where the config has time_cond_proj_dim "guidance" (b,), the w of the w-embedding, and
        where it has span_embedding "span" (b,), how far the step reaches, in t's unit (none: 0, the velocity at t).
        skip_layers: blocks to pass by, for skip-layer guidance; static."""
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_inputs(config, x, cond)
        if any(i not in range(config.num_layers) for i in skip_layers):
            raise ValueError(f"skip_layers={skip_layers} must be of the layers 0 to {config.num_layers - 1}")
        context, c = embed_condition(config, x.shape[0], t, cond, types)
        tokens = PatchEmbed(config, name="pos_embed", **types)(x)
        tokens = self._blocks(tokens, context, c, skip_layers)
        y = project_out(tokens, c, config.patch_size**2 * config.out_channels, types)
        return unpatchify(y, config.patch_size, x.shape[1]).astype(x.dtype)

    def _blocks(self, x: Array, context: Array, c: Array, skip_layers: tuple[int, ...]) -> Array:
        carry = (x, context)
        block = rematerialized(JointBlock, self.remat)
        for first, length in self.config.runs:
            run = range(first, first + length)
            if self.scan and length > 1:
                keep = None
                if any(i in run for i in skip_layers):
                    keep = jnp.asarray([i not in skip_layers for i in run])
                name = "transformer_blocks" if first == 0 else f"transformer_blocks_from_{first}"
                stack = stacked(JointBlock, length, self.remat, in_axes=(nn.broadcast, 0))
                carry, _ = stack(name=name, **self._block(first))(carry, c, keep)
                continue
            for i in run:
                if i not in skip_layers or self.is_initializing():
                    carry, _ = block(name=f"transformer_blocks_{i}", **self._block(i))(carry, c)
        return carry[0]

    def _block(self, i: int) -> dict[str, Any]:
        """The fields of block i."""
        return {
            "heads": self.config.num_attention_heads,
            "dual": self.config.is_dual(i),
            "last": self.config.is_last(i),
            "qk_norm": self.config.qk_norm is not None,
            "implementation": self.attention,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }


def embed_condition(
    config: MMDiTConfig, batch: int, t: Array, cond: Mapping[str, Array], types: dict[str, Any]
) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
    """The text's tokens and the activated vector that modulates, by layers of the module that calls."""
    guidance, span = (
        None if cond.get(name) is None else jnp.broadcast_to(jnp.asarray(cond[name]), (batch,))
        for name in ("guidance", "span")
    )
    embed = TimeTextEmbed(
        config.width, config.time_cond_proj_dim, types["param_dtype"], config.span_embedding, name="time_text_embed"
    )
    c = embed(jnp.broadcast_to(jnp.asarray(t), (batch,)), cond["pooled"], guidance, span)
    context = dense(config.width, "context_embedder", **types)(cond["context"].astype(types["dtype"]))
    return context, nn.silu(c).astype(types["dtype"])


def project_out(tokens: Array, c: Array, features: int, types: dict[str, Any]) -> Float[Array, "b n p"]:
    """The last layer, under scale and shift; zero at first. Its layers are those of the module that calls."""
    scale, shift = Modulation(2, name="norm_out", **types)(c)
    return dense(features, "proj_out", zero=True, **types)(modulate(normalize(tokens), shift, scale))


def check_inputs(config: MMDiTConfig, x: Array, cond: Mapping[str, Array]) -> None:
    """One line for what the layers would refuse in theirs, or take without a word."""
    b, h, w, channels = x.shape
    patch, grid = config.patch_size, config.pos_embed_max_size
    if channels != config.in_channels:
        raise ValueError(f"the latent has {channels} channels, the MMDiT's in_channels is {config.in_channels}")
    if h % patch or w % patch:
        raise ValueError(f"the latent is {h} x {w}: both must be multiples of patch_size={patch}; crop or pad it")
    if max(h, w) > grid * patch:
        raise ValueError(
            f"the latent is {h} x {w}, larger than the position grid: pos_embed_max_size={grid} patches of {patch} "
            f"reach {grid * patch}; use a smaller picture"
        )
    for name, key, middle in (
        ("context", "joint_attention_dim", ("l",)),
        ("pooled", "pooled_projection_dim", ()),
    ):
        shape, width = jnp.shape(cond[name]) if cond.get(name) is not None else None, getattr(config, key)
        if shape is None or len(shape) != 2 + len(middle) or (shape[0], shape[-1]) != (b, width):
            want = ", ".join(map(str, (b, *middle, width)))
            raise ValueError(f"cond: {name!r} has shape {shape}, expected ({want}) by the batch and the config's {key}")
    if cond.get("guidance") is not None and config.time_cond_proj_dim is None:
        raise ValueError(
            "cond has 'guidance', but the MMDiT config has no time_cond_proj_dim: leave it out, or set "
            "time_cond_proj_dim=256 for a network with a w-embedding"
        )
    if cond.get("span") is not None and not config.span_embedding:
        raise ValueError("cond has 'span', but the MMDiT config has no span_embedding: leave it out, or set it to true")


def example_inputs(
    config: MMDiTConfig, *, batch: int = 1, size: tuple[int, int] | None = None, tokens: int = 4
) -> tuple[Array, Array, dict[str, Array]]:
    """Zeros of the shapes that `apply` and `init` take: x, t, cond. size: of the latent; None is one patch."""
    cond = {
        "context": jnp.zeros((batch, tokens, config.joint_attention_dim)),
        "pooled": jnp.zeros((batch, config.pooled_projection_dim)),
    }
    if config.time_cond_proj_dim is not None:
        cond["guidance"] = jnp.zeros((batch,))
    if config.span_embedding:
        cond["span"] = jnp.zeros((batch,))
    h, w = (config.patch_size, config.patch_size) if size is None else size
    return jnp.zeros((batch, h, w, config.in_channels)), jnp.zeros((batch,)), cond


def abstract_params(net: Any) -> Any:
    """Shapes and dtypes of the parameters of an MMDiT, or of another network with its config; nothing is computed."""
    x, t, cond = jax.eval_shape(lambda: example_inputs(net.config))
    return jax.eval_shape(net.init, jax.eval_shape(lambda: jax.random.key(0)), x, t, cond)["params"]
