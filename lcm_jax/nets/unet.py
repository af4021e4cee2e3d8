"""The UNet of Stable Diffusion 1.x, 2.x, XL, SSD-1B and their latent consistency models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from lcm_jax.nets.blocks import BlockSettings, DownBlock, MidBlock, UpBlock
from lcm_jax.nets.config import UNetConfig
from lcm_jax.nets.embed import TimestepEmbedding, guidance_embedding, sinusoidal
from lcm_jax.nets.layers import conv
from mmdit.attention import Implementation
from mmdit.blocks import Remat
from vae16.layers import GroupNorm


class UNet(nn.Module):
    """The UNet of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752), with a w-embedding for LCMs.

    It maps (noisy latent, time, conditioning) to a raw output (b, h, w, out_channels) in the dtype of the latent.

    scan: stack transformers of more than one block, so that one block is compiled; the parameters are stacked too.
    remat: recompute the activations of residual and transformer blocks in the backward pass instead of storing them:
    all of them (True), or those that a policy of jax.checkpoint_policies, given by name, does not store.
    dtype: of the computation; norms, softmax and time embedding stay float32. param_dtype: of new parameters.
    attention: the kernel; None chooses by platform and precision (`mmdit.attention.attention`).

    >>> import jax
    >>> from lcm_jax.nets import UNet, UNetConfig, example_inputs
    >>> sizes = dict(block_out_channels=(4,), cross_attention_dim=4, attention_head_dim=1, norm_num_groups=2)
    >>> blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    >>> net = UNet(UNetConfig(**sizes, **blocks, layers_per_block=1, mid_block_type=None, time_cond_proj_dim=4))
    >>> x, t, cond = example_inputs(net.config, batch=2, size=(8, 6))
    >>> sorted(cond)
    ['context', 'guidance']
    >>> output, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, cond)
    >>> output.shape
    (2, 8, 6, 4)
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
        """Return the raw output (b, h, w, out_channels) for a noisy latent x, in the dtype of x.

        t: scalar or (b,), in DDPM timesteps 0..999, fractions allowed. cond: "context" (b, l, d); "guidance" (b,), the
        w of the w-embedding, or (b, 3) with an interval, if the config has time_cond_proj_dim; "span" (b,), the length
        of the step in t's unit, if the config has span_embedding (without it 0); "pooled" (b, p) and "time_ids" (b, 6)
        in pixels, if the config has addition_embed_type. Raises ValueError for conditioning that does not fit.
        """
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
            stage = self._stage(i, kind.startswith("CrossAttn"), config.down_depths(i))
            down = DownBlock(**stage, downsample=i < levels - 1, name=f"down_blocks_{i}")
            y, new_skips = down(y, time, context)
            skips += new_skips
        if config.mid_block_type is not None:
            stage = self._stage(-1, config.mid_block_type.endswith("CrossAttn"), (config.mid_depth(),))
            # diffusers' middle block does not use only_cross_attention
            stage["settings"] = replace(stage["settings"], only_cross_attention=False)
            y = MidBlock(**stage, name="mid_block")(y, time, context)
        for i, kind in enumerate(config.up_block_types):
            depths = config.up_depths(i)
            block_skips, skips = skips[-len(depths) :], skips[: -len(depths)]
            stage = self._stage(levels - 1 - i, kind.startswith("CrossAttn"), depths)
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            y = UpBlock(**stage, name=f"up_blocks_{i}")(y, block_skips, time, context, size)

        y = GroupNorm(config.norm_num_groups, config.norm_eps, silu=True, name="conv_norm_out", **types)(y)
        return conv(config.out_channels, "conv_out", kernel=config.conv_out_kernel, **types)(y).astype(x.dtype)

    def _stage(self, level: int, attends: bool, depths: tuple[int, ...]) -> dict[str, Any]:
        """Return the fields of a block of a level: its width, heads, depths and settings."""
        config = self.config
        settings = BlockSettings(
            groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            linear=config.use_linear_projection,
            only_cross_attention=config.level("only_cross_attention", level),
            implementation=self.attention,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        heads = config.heads[level] if attends else None
        return {"features": config.block_out_channels[level], "depths": depths, "heads": heads, "settings": settings}

    def _time(self, batch: int, t: Array, cond: Mapping[str, Array]) -> Float[Array, "b d"]:
        """Return the embedding of time, guidance, pooled text and image sizes, in float32."""
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
            guidance = jnp.asarray(cond["guidance"])
            guidance = guidance if guidance.ndim == 2 else jnp.broadcast_to(guidance, (batch,))
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
    """Return zeros (x, t, cond) of the shapes that `apply` and `init` take.

    size: height and width of the latent. tokens: length of the text.

    >>> from lcm_jax.nets import SDXL, example_inputs
    >>> x, t, cond = example_inputs(SDXL)
    >>> x.shape, cond["context"].shape, cond["pooled"].shape, cond["time_ids"].shape
    ((1, 8, 8, 4), (1, 4, 2048), (1, 1280), (1, 6))
    """
    cond = {"context": jnp.zeros((batch, tokens, config.level("cross_attention_dim", 0)))}
    if config.time_cond_proj_dim is not None:
        cond["guidance"] = jnp.zeros((batch,))
    if config.span_embedding:
        cond["span"] = jnp.zeros((batch,))
    if config.text_time is not None:
        width, total = config.text_time
        ids = 5 if total == 2560 else 6  # the refiner has one aesthetic score in place of the two target sizes
        cond |= {"pooled": jnp.zeros((batch, total - ids * width)), "time_ids": jnp.zeros((batch, ids))}
    return jnp.zeros((batch, *size, config.in_channels)), jnp.zeros((batch,)), cond


def abstract_params(net: UNet) -> Any:
    """Return shapes and dtypes of a UNet's parameters, without computing anything.

    `lcm_jax.weights.torch_params.from_torch` takes them as the `like` of a PyTorch file.
    """
    x, t, cond = jax.eval_shape(lambda: example_inputs(net.config))
    return jax.eval_shape(net.init, jax.eval_shape(lambda: jax.random.key(0)), x, t, cond)["params"]
