"""AutoencoderKL: images in [-1, 1] to Gaussian latents and back (Rombach et al. 2022, section 3.1).

One architecture covers SD1 and SDXL (4 latent channels, 1x1 quantisation convolutions), SD3 and FLUX (16 channels, no
quantisation convolutions) and any smaller network: the number of blocks, their widths and depth come from the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vae16.layers import Downsample, GroupNorm, ResnetBlock, SelfAttention, Types, Upsample, conv

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The architecture of an AutoencoderKL: the keys of diffusers' config.json, with its defaults for absent ones.

    Raises ValueError unless act_fn is "silu" and every width is a multiple of norm_num_groups.

    >>> from vae16 import AutoencoderConfig
    >>> sd3 = AutoencoderConfig(
    ...     latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, use_quant_conv=False,
    ...     use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ... )
    >>> sd3.downsample_factor
    8
    >>> AutoencoderConfig.from_dict(sd3.to_dict()) == sd3
    True
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    sample_size: int = 32
    force_upcast: bool = True  # advice to callers: these weights overflow in float16

    def __post_init__(self) -> None:
        if not self.block_out_channels:
            raise ValueError("block_out_channels: needs at least one width")
        if self.act_fn != "silu":
            raise ValueError(f"act_fn: {self.act_fn!r} is not supported; only 'silu' is")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of {self.norm_num_groups} (norm_num_groups)"
                )

    @property
    def downsample_factor(self) -> int:
        """The number of pixels per latent position along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], *, source: str = "config.json") -> AutoencoderConfig:
        """Read the content of a config.json.

        Raises ValueError that names `source` and the key whose value would change the result and is not supported.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in d.items():
            if key in known:
                values[key] = tuple(value) if key == "block_out_channels" else value
            elif key in _BLOCK_TYPES:
                unsupported = sorted({str(v) for v in value} - {_BLOCK_TYPES[key]})
                if unsupported:
                    raise ValueError(
                        f"{source}: {key}: {unsupported[0]!r} is not supported; only {_BLOCK_TYPES[key]!r} is"
                    )
            elif not key.startswith("_") and value is not None:
                raise ValueError(f"{source}: {key}={value!r} is not supported by AutoencoderKL; remove it if unused")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that diffusers loads."""
        n = len(self.block_out_channels)
        blocks = {key: [kind] * n for key, kind in _BLOCK_TYPES.items()}
        widths = {"block_out_channels": list(self.block_out_channels)}
        return {"_class_name": "AutoencoderKL"} | asdict(self) | widths | blocks


_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def sample_latent(
    mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"], key: Key[Array, ""]
) -> Float[Array, "b h w z"]:
    """Draw z ~ N(mean, exp(logvar)) as mean + exp(logvar / 2) eps (Kingma & Welling 2014, eq. 10).

    The result is differentiable in both; a logvar of -inf returns the mean.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import sample_latent
    >>> moments = jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float32)
    >>> jax.eval_shape(sample_latent, moments, moments, jax.random.key(0)).shape
    (1, 2, 2, 4)
    """
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


@runtime_checkable
class LatentUnits(Protocol):
    """The part of an autoencoder's config that `scale` and `unscale` read."""

    @property
    def scaling_factor(self) -> float: ...
    @property
    def shift_factor(self) -> float | None: ...


def scale(z: Float[Array, "*b h w z"], config: LatentUnits) -> Float[Array, "*b h w z"]:
    """Turn an autoencoder latent into a diffusion latent of about unit variance: (z - shift) * scaling.

    >>> import jax.numpy as jnp
    >>> from vae16 import AutoencoderConfig, scale, unscale
    >>> config = AutoencoderConfig(scaling_factor=0.5, shift_factor=1.0)
    >>> z = scale(jnp.full((1, 1, 1, 4), 3.0), config)
    >>> float(z[0, 0, 0, 0]), float(unscale(z, config)[0, 0, 0, 0])
    (1.0, 3.0)
    """
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale(z: Float[Array, "*b h w z"], config: LatentUnits) -> Float[Array, "*b h w z"]:
    """Turn a diffusion latent into an autoencoder latent, the inverse of `scale`: z / scaling + shift."""
    return z / config.scaling_factor + (config.shift_factor or 0.0)


def fold_shift(config: AutoencoderConfig, params: Mapping[str, Any]) -> tuple[AutoencoderConfig, Mapping[str, Any]]:
    """Return the same autoencoder with a shift_factor of 0, for programs that only scale.

    The shift moves into the weights: mean' = mean - shift and decode'(z) = decode(z + shift). Both become biases of the
    1x1 quantisation convolutions, which have no padding, so this is exact at the edges too. An autoencoder without
    these convolutions gets them, as identities with a bias.
    """
    shift, z = config.shift_factor, config.latent_channels
    if not shift:
        return config, params
    dtype = params["decoder"]["conv_in"]["kernel"].dtype

    def with_bias(name: str, width: int, added_bias: Callable[[Array], Array]) -> dict[str, Array]:
        layer = params.get(name) or {"kernel": jnp.eye(width)[None, None], "bias": jnp.zeros(width)}
        kernel, bias = (jnp.asarray(layer[leaf], jnp.float32) for leaf in ("kernel", "bias"))
        return {"kernel": kernel.astype(dtype), "bias": (bias + added_bias(kernel)).astype(dtype)}

    # The first z of the 2 z outputs are the means.
    quant = with_bias("quant_conv", 2 * z, lambda _: jnp.where(jnp.arange(2 * z) < z, -shift, 0.0))
    post = with_bias("post_quant_conv", z, lambda kernel: shift * kernel.sum((0, 1, 2)))
    config = replace(config, use_quant_conv=True, use_post_quant_conv=True, shift_factor=0.0)
    return config, {**params, "quant_conv": quant, "post_quant_conv": post}


class _Stage(nn.Module):
    """A stack of `depth` residual blocks of one width, then the resampling layer if there is one."""

    features: int
    depth: int
    num_groups: int
    resample: type[nn.Module] | None = None
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        for i in range(self.depth):
            x = block(self.features, self.num_groups, **types, name=f"resnets_{i}")(x)
        if self.resample is not None:
            name = "downsamplers_0" if self.resample is Downsample else "upsamplers_0"
            x = self.resample(**types, name=name)(x)
        return x


class _Middle(nn.Module):
    """The residual block, self-attention and residual block at the lowest resolution."""

    num_groups: int
    attention: bool
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = ResnetBlock(x.shape[-1], self.num_groups, **types, name="resnets_0")(x)
        if self.attention:
            x = SelfAttention(self.num_groups, **types, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.num_groups, **types, name="resnets_1")(x)


class Encoder(nn.Module):
    """The network from an image (b, h, w, 3) to moments (b, h/f, w/f, 2 z): means, then log-variances."""

    config: AutoencoderConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z2"]:
        c = self.config
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        last = len(c.block_out_channels) - 1
        h = conv(c.block_out_channels[0], **types, name="conv_in")(x)
        for i, width in enumerate(c.block_out_channels):
            resample = Downsample if i < last else None
            stage = _Stage(
                width, c.layers_per_block, c.norm_num_groups, resample, self.remat, **types, name=f"down_blocks_{i}"
            )
            h = stage(h)
        h = _Middle(c.norm_num_groups, c.mid_block_add_attention, **types, name="mid_block")(h)
        h = GroupNorm(c.norm_num_groups, silu=True, **types, name="conv_norm_out")(h)
        return conv(2 * c.latent_channels, **types, name="conv_out")(h)


class Decoder(nn.Module):
    """The network from a latent (b, h, w, z) to an image (b, f h, f w, 3), or to the features that `conv_out` reads."""

    config: AutoencoderConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"], features: bool = False) -> Float[Array, "b h2 w2 c"]:
        c = self.config
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = c.block_out_channels[::-1]
        h = conv(widths[0], **types, name="conv_in")(z)
        h = _Middle(c.norm_num_groups, c.mid_block_add_attention, **types, name="mid_block")(h)
        for i, width in enumerate(widths):
            resample = Upsample if i < len(widths) - 1 else None
            stage = _Stage(
                width, c.layers_per_block + 1, c.norm_num_groups, resample, self.remat, **types, name=f"up_blocks_{i}"
            )
            h = stage(h)
        h = GroupNorm(c.norm_num_groups, silu=True, **types, name="conv_norm_out")(h)
        if features:
            return h
        return conv(c.out_channels, **types, name="conv_out")(h)


class AutoencoderKL(nn.Module):
    """The KL autoencoder of Stable Diffusion (Rombach et al. 2022, section 3.1).

    Latents here are unscaled; `scale` and `unscale` convert to and from diffusion latents. `remat` recomputes the
    residual blocks in the backward pass, trading a third more compute for memory.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import AutoencoderConfig, AutoencoderKL
    >>> vae = AutoencoderKL(AutoencoderConfig(latent_channels=16, block_out_channels=(4, 4), norm_num_groups=2))
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    >>> image, variables = jax.eval_shape(vae.init_with_output, jax.random.key(0), x)
    >>> mean, logvar = jax.eval_shape(lambda v, x: vae.apply(v, x, method="encode"), variables, x)
    >>> mean.shape, logvar.shape, image.shape
    ((1, 4, 4, 16), (1, 4, 4, 16), (1, 8, 8, 3))
    """

    config: AutoencoderConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(c, self.remat, **types)
        self.decoder = Decoder(c, self.remat, **types)
        if c.use_quant_conv:
            self.quant_conv = conv(2 * c.latent_channels, 1, **types)
        if c.use_post_quant_conv:
            self.post_quant_conv = conv(c.latent_channels, 1, **types)

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """Return mean and log-variance of q(z | x), in float32, for images in [-1, 1].

        Raises ValueError unless both sides are multiples of `config.downsample_factor`.
        """
        factor = self.config.downsample_factor
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"image {x.shape[1]}x{x.shape[2]}: sides must be multiples of {factor}; pad or crop it")
        h = self.encoder(x)
        if self.config.use_quant_conv:
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Float[Array, "b h w z"], features: bool = False) -> Float[Array, "b h2 w2 c"]:
        """Return the image of a latent; with `features`, the activations just before the decoder's last convolution."""
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z, features)

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None = None) -> Float[Array, "b h w c"]:
        """Return the reconstruction from the posterior mean, or from a sample when a key is given."""
        mean, logvar = self.encode(x)
        return self.decode(mean if key is None else sample_latent(mean, logvar, key))


def last_convolution(vae: AutoencoderKL) -> nn.Conv:
    """Return the decoder's `conv_out` as a module of its own.

    Apply it to `decode(z, features=True)` with the parameters params["decoder"]["conv_out"].
    """
    return conv(vae.config.out_channels, dtype=vae.dtype, param_dtype=vae.param_dtype)
