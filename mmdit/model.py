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
    """The MMDiT, a transformer with joint attention of image and text tokens (Esser et al. 2024, arXiv:2403.03206).

    It maps (noisy latent, time, conditioning) to a raw output (b, h, w, out_channels) in the dtype of the latent: the
    velocity eps - x0 of the rectified flow in Stable Diffusion 3.

    scan: stack every run of equal blocks (all but the last; in SD3.5-medium the dual ones, then the others), so that
    one block of each run is compiled; their parameters are stacked too.
    remat: recompute a block's activations in the backward pass instead of storing them; or the name of a policy of
    jax.checkpoint_policies, which says what is stored all the same.
    dtype: of the computation; norms, softmax and the time embedding stay float32. param_dtype: of new parameters.
    attention: the kernel; None chooses by platform and precision (`mmdit.attention.attention`).

    >>> import jax
    >>> from mmdit import MMDiT, MMDiTConfig, example_inputs
    >>> config = MMDiTConfig(
    ...     sample_size=4, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=1,
    ...     joint_attention_dim=4, caption_projection_dim=4, pooled_projection_dim=4, pos_embed_max_size=4,
    ... )
    >>> x, t, cond = example_inputs(config, batch=2, size=(4, 6))
    >>> velocity, _ = jax.eval_shape(MMDiT(config).init_with_output, jax.random.key(0), x, t, cond)
    >>> velocity.shape
    (2, 4, 6, 4)
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
        """Return the raw output (b, h, w, out_channels) for a noisy latent x, in the dtype of x.

        t: scalar or (b,), 1000 times the time of the rectified flow, 0..1000. cond: "context" (b, l, d) and "pooled"
        (b, p); "guidance" (b,), the w of the w-embedding, or (b, 3) with an interval, if the config has
        time_cond_proj_dim; "span" (b,), the length of the step in t's unit, if the config has span_embedding (without
        it 0, the velocity at t). skip_layers: blocks to leave out, for skip-layer guidance; static. Raises
        ValueError for inputs that do not fit the config.
        """
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
        """Return the fields of block i."""
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
    """Return the text's tokens and the activated modulation vector; the layers belong to the calling module."""
    guidance, span = (None if cond.get(name) is None else jnp.asarray(cond[name]) for name in ("guidance", "span"))
    guidance, span = (
        value if value is None or value.ndim == 2 else jnp.broadcast_to(value, (batch,)) for value in (guidance, span)
    )
    embed = TimeTextEmbed(
        config.width, config.time_cond_proj_dim, types["param_dtype"], config.span_embedding, name="time_text_embed"
    )
    c = embed(jnp.broadcast_to(jnp.asarray(t), (batch,)), cond["pooled"], guidance, span)
    context = dense(config.width, "context_embedder", **types)(cond["context"].astype(types["dtype"]))
    return context, nn.silu(c).astype(types["dtype"])


def project_out(tokens: Array, c: Array, features: int, types: dict[str, Any]) -> Float[Array, "b n p"]:
    """Return the output of the last layer, a projection of modulated tokens that is zero at first.

    The layers belong to the calling module.
    """
    scale, shift = Modulation(2, name="norm_out", **types)(c)
    return dense(features, "proj_out", zero=True, **types)(modulate(normalize(tokens), shift, scale))


def check_inputs(config: MMDiTConfig, x: Array, cond: Mapping[str, Array]) -> None:
    """Raise a ValueError of one line for inputs that do not fit the config.

    Without it some of them would fail deep inside a layer, and others would be accepted.
    """
    b, h, w, channels = x.shape
    patch, grid = config.patch_size, config.pos_embed_max_size
    if channels != config.in_channels:
        raise ValueError(f"the latent has {channels} channels, the MMDiT's in_channels is {config.in_channels}")
    if h % patch or w % patch:
        raise ValueError(f"the latent is {h} x {w}: both must be multiples of patch_size={patch}; crop or pad it")
    if max(h, w) > grid * patch:
        raise ValueError(
            f"the latent is {h} x {w}, larger than the position grid: pos_embed_max_size={grid} patches of {patch} "
            f"reach {grid * patch}; use a smaller image"
        )
    for name, key, middle in (
        ("context", "joint_attention_dim", ("l",)),
        ("pooled", "pooled_projection_dim", ()),
    ):
        shape, width = jnp.shape(cond[name]) if cond.get(name) is not None else None, getattr(config, key)
        if shape is None or len(shape) != 2 + len(middle) or (shape[0], shape[-1]) != (b, width):
            expected = ", ".join(map(str, (b, *middle, width)))
            raise ValueError(
                f"cond: {name!r} has shape {shape}, expected ({expected}) by the batch and the config's {key}"
            )
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
    """Return zeros (x, t, cond) of the shapes that `apply` and `init` take.

    size: height and width of the latent; None is one patch. tokens: length of the text.

    >>> from mmdit import SD3_MEDIUM, example_inputs
    >>> x, t, cond = example_inputs(SD3_MEDIUM)
    >>> x.shape, t.shape, cond["context"].shape, cond["pooled"].shape
    ((1, 2, 2, 16), (1,), (1, 4, 4096), (1, 2048))
    """
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
    """Return shapes and dtypes of the parameters of an MMDiT or a baseline, without computing anything.

    >>> from mmdit import MMDiT, SD3_MEDIUM, abstract_params
    >>> abstract_params(MMDiT(SD3_MEDIUM, scan=True))["context_embedder"]["kernel"].shape
    (4096, 1536)
    """
    x, t, cond = jax.eval_shape(lambda: example_inputs(net.config))
    return jax.eval_shape(net.init, jax.eval_shape(lambda: jax.random.key(0)), x, t, cond)["params"]
