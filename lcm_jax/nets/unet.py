"""The UNet of Stable Diffusion 1.x, 2.x, XL, SSD-1B and their latent consistency models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from lcm_jax.nets.blocks import DownBlock, MidBlock, UpBlock
from lcm_jax.nets.config import UNetConfig
from lcm_jax.nets.embed import TimestepEmbedding, guidance_embedding, sinusoidal
from lcm_jax.nets.layers import conv
from mmdit.attention import Implementation
from mmdit.blocks import Remat
from vae16.layers import GroupNorm


class UNet(nn.Module):
    """(noisy latent, time, conditioning) -> raw output (b, h, w, out_channels), in the precision of the latent.

    scan: stack transformers of more than one block, so that one block is compiled; the parameters are stacked too.
    remat: recompute the inside of residual and transformer blocks in the backward pass instead of storing it, all of it
        (True) or what a policy of jax.checkpoint_policies leaves out.
    dtype: of the computation; norms, softmax and time embedding stay float32. param_dtype: of new parameters.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: Remat = False
    attention: Implementation | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Shaped[Array, "*b"], cond: Mapping[str, Array]
    ) -> Float[Array, "b h w o"]:
        """t: scalar or (b,), in DDPM timesteps 0..999, fractions allowed. cond: "context" (b, l, d); where the config
        has them "guidance" (b,), the w of the w-embedding, "span" (b,), how far the step reaches in t's unit (none: 0),
        and "pooled" (b, p) with "time_ids" (b, 6) in pixels."""
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        time = nn.silu(self._time(x.shape[0], t, cond)).astype(self.dtype)
        context = cond["context"].astype(self.dtype)

        y = x.astype(self.dtype)
        if config.center_input_sample:
            y = 2 * y - 1
        y = conv(config.block_out_channels[0], "conv_in", kernel=config.conv_in_kernel, **types)(y)
        skips = [y]
        levels = len(config.block_out_channels)
        for i, kind in enumerate(config.down_block_types):
            stage = self._stage(i, kind.startswith("CrossAttn")) | {"downsample": i < levels - 1}
            y, more = DownBlock(depths=config.down_depths(i), name=f"down_blocks_{i}", **stage)(y, time, context)
            skips += more
        if config.mid_block_type is not None:
            # diffusers' middle never reads only_cross_attention
            stage = self._stage(-1, config.mid_block_type.endswith("CrossAttn")) | {"only_cross_attention": False}
            y = MidBlock(depths=(config.mid_depth(),), name="mid_block", **stage)(y, time, context)
        for i, kind in enumerate(config.up_block_types):
            depths = config.up_depths(i)
            mine, skips = skips[-len(depths) :], skips[: -len(depths)]
            stage = self._stage(levels - 1 - i, kind.startswith("CrossAttn"))
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            y = UpBlock(depths=depths, name=f"up_blocks_{i}", **stage)(y, mine, time, context, size)

        y = GroupNorm(config.norm_num_groups, config.norm_eps, silu=True, name="conv_norm_out", **types)(y)
        return conv(config.out_channels, "conv_out", kernel=config.conv_out_kernel, **types)(y).astype(x.dtype)

    def _stage(self, level: int, attends: bool) -> dict[str, Any]:
        """The fields that the blocks of a level share."""
        config = self.config
        return {
            "features": config.block_out_channels[level],
            "heads": config.heads[level] if attends else None,
            "groups": config.norm_num_groups,
            "epsilon": config.norm_eps,
            "scale_shift": config.resnet_time_scale_shift == "scale_shift",
            "linear": config.use_linear_projection,
            "only_cross_attention": config.level("only_cross_attention", level),
            "implementation": self.attention,
            "scan": self.scan,
            "remat": self.remat,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

    def _time(self, batch: int, t: Array, cond: Mapping[str, Array]) -> Float[Array, "b d"]:
        """The embedding of time, guidance, pooled text and picture sizes, in float32."""
        config = self.config
        width = config.block_out_channels[0]
        features = config.time_embedding_dim or 4 * width
        guidance = None
        if cond.get("guidance") is not None:
            if config.time_cond_proj_dim is None:
                raise ValueError(
                    "cond has 'guidance', but the UNet config has no time_cond_proj_dim: leave it out, or set "
                    "time_cond_proj_dim=256 for a network with a w-embedding"
                )
            guidance = jnp.broadcast_to(jnp.asarray(cond["guidance"]), (batch,))
            guidance = guidance_embedding(guidance, config.time_cond_proj_dim)

        def sinusoid(values: Array, dim: int) -> Array:
            return sinusoidal(values, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)

        if cond.get("span") is not None and not config.span_embedding:
            raise ValueError(
                "cond has 'span', but the UNet config has no span_embedding: leave it out, or set it to true"
            )
        span = None if cond.get("span") is None else jnp.broadcast_to(jnp.asarray(cond["span"]), (batch,))
        embed = TimestepEmbedding(
            features, config.time_cond_proj_dim, self.param_dtype, config.span_embedding, name="time_embedding"
        )
        time = sinusoid(jnp.broadcast_to(jnp.asarray(t), (batch,)), width)
        time = embed(time, guidance, None if span is None else sinusoid(span, width))
        if config.text_time is None:
            return time
        if cond.get("pooled") is None or cond.get("time_ids") is None:
            raise ValueError("the UNet config has addition_embed_type='text_time': cond needs 'pooled' and 'time_ids'")
        width, total = config.text_time
        sizes = sinusoid(cond["time_ids"].reshape(-1), width).reshape(batch, -1)
        extra = jnp.concatenate([cond["pooled"].astype(jnp.float32), sizes], axis=-1)
        if extra.shape[-1] != total:
            raise ValueError(
                f"cond: 'pooled' {cond['pooled'].shape} and 'time_ids' {cond['time_ids'].shape} embed to width "
                f"{extra.shape[-1]}; the UNet's projection_class_embeddings_input_dim is {total}"
            )
        return time + TimestepEmbedding(features, param_dtype=self.param_dtype, name="add_embedding")(extra)


def example_inputs(
    config: UNetConfig, *, batch: int = 1, size: tuple[int, int] = (8, 8), tokens: int = 4
) -> tuple[Array, Array, dict[str, Array]]:
    """Zeros of the shapes that `apply` and `init` take: x, t, cond."""
    cond = {"context": jnp.zeros((batch, tokens, config.level("cross_attention_dim", 0)))}
    if config.time_cond_proj_dim is not None:
        cond["guidance"] = jnp.zeros((batch,))
    if config.span_embedding:
        cond["span"] = jnp.zeros((batch,))
    if config.text_time is not None:
        width, total = config.text_time
        ids = 5 if total == 2560 else 6  # the refiner has one aesthetic score for two target sizes
        cond |= {"pooled": jnp.zeros((batch, total - ids * width)), "time_ids": jnp.zeros((batch, ids))}
    return jnp.zeros((batch, *size, config.in_channels)), jnp.zeros((batch,)), cond


def abstract_params(net: UNet) -> Any:
    """Shapes and dtypes of the parameters, without computing anything: what `weights.engine.from_torch` fills."""
    x, t, cond = jax.eval_shape(lambda: example_inputs(net.config))
    return jax.eval_shape(net.init, jax.eval_shape(lambda: jax.random.key(0)), x, t, cond)["params"]
