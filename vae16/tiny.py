"""AutoencoderTiny: TAESD (Bohan 2023, github.com/madebyollin/taesd), a distilled autoencoder for previews and streams.

Convolutions and ReLU only. Its latents are the diffusion network's own: `scale` and `unscale` leave them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vae16.layers import NearestConv, Types, conv


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": _gelu,
}
_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
_DEPTHS = ("num_encoder_blocks", "num_decoder_blocks")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """The keys of diffusers' AutoencoderTiny config.json and its defaults, which are TAESD's and TAESDXL's geometry.

    latent_magnitude, latent_shift: z / (2 magnitude) + shift lies in [0, 1], for storing latents as bytes; neither
    encode nor decode uses them. act_fn: between the convolutions of a block; after its sum there is always a ReLU.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        for width, depth in zip(_WIDTHS, _DEPTHS, strict=True):
            widths, depths = getattr(self, width), getattr(self, depth)
            if len(set(widths)) != 1:
                raise ValueError(f"{width}: {list(widths)} must be one width, repeated: no layer changes it on the way")
            if len(widths) != len(depths):
                raise ValueError(f"{depth}: {list(depths)} has {len(depths)} entries, {width} {len(widths)}")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn: {self.act_fn!r} is none of {', '.join(ACTIVATIONS)}")
        up = self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
        if up != self.downsample_factor:
            raise ValueError(
                f"num_decoder_blocks: the decoder enlarges by {up}, the encoder shrinks by {self.downsample_factor}"
            )

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent position along one side."""
        return int(2 ** (len(self.num_encoder_blocks) - 1))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], *, source: str = "config.json") -> TinyConfig:
        """Read a config.json; ValueError names any key whose value would change the result and is not supported."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in d.items():
            if key in known:
                values[key] = tuple(value) if key in _WIDTHS + _DEPTHS else value
            elif key == "upsample_fn" and value != "nearest":
                raise ValueError(f"{source}: upsample_fn: {value!r} is not supported; only 'nearest' is")
            # diffusers repeats the decoder's widths as block_out_channels, and does not read them back.
            elif key not in ("upsample_fn", "block_out_channels") and not key.startswith("_") and value is not None:
                raise ValueError(f"{source}: {key}={value!r} is not supported by AutoencoderTiny; remove it if unused")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A config.json that diffusers loads."""
        lists = {key: list(getattr(self, key)) for key in _WIDTHS + _DEPTHS}
        return {"_class_name": "AutoencoderTiny"} | asdict(self) | lists


TAESD = TinyConfig()
TAESD3 = TinyConfig(latent_channels=16)


class _Block(nn.Module):
    """Three 3x3 convolutions beside the identity, and a ReLU of the sum."""

    act: str
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = conv(x.shape[-1], **types, name="conv_0")(x)
        for i in (2, 4):
            h = conv(x.shape[-1], **types, name=f"conv_{i}")(ACTIVATIONS[self.act](h))
        return nn.relu(x + h)


def _names() -> Iterator[str]:
    """Places in torch's Sequential."""
    return (f"layers_{i}" for i in count())


class _Encoder(nn.Module):
    """Image (b, h, w, c) in [0, 1] to latent (b, h/f, w/f, z)."""

    config: TinyConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
        c, names = self.config, _names()
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = c.encoder_block_out_channels[0]
        for i, depth in enumerate(c.num_encoder_blocks):
            if i:
                x = nn.Conv(width, (3, 3), strides=2, padding=1, use_bias=False, **types, name=next(names))(x)
            else:
                x = conv(width, **types, name=next(names))(x)
            for _ in range(depth):
                x = _Block(c.act_fn, **types, name=next(names))(x)
        return conv(c.latent_channels, **types, name=next(names))(x)


class _Decoder(nn.Module):
    """Latent (b, h, w, z) to image (b, f h, f w, c) in [0, 1]."""

    config: TinyConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"], features: bool = False) -> Float[Array, "b h2 w2 c"]:
        c, names = self.config, _names()
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, factor = c.decoder_block_out_channels[0], c.upsampling_scaling_factor
        x = ACTIVATIONS[c.act_fn](conv(width, **types, name=next(names))(z))
        next(names)  # the activation has a place in the Sequential too, as each enlargement below
        for i, depth in enumerate(c.num_decoder_blocks):
            if i:
                next(names)
                if factor == 2:
                    x = NearestConv(width, **types, use_bias=False, name=next(names))(x)
                else:
                    x = repeat(x, "b h w c -> b (h p) (w q) c", p=factor, q=factor)
                    x = conv(width, **types, use_bias=False, name=next(names))(x)
            for _ in range(depth):
                x = _Block(c.act_fn, **types, name=next(names))(x)
        return x if features else conv(c.out_channels, **types, name=next(names))(x)


class AutoencoderTiny(nn.Module):
    """The tiny autoencoder, called as AutoencoderKL is. Latents need no scaling: its config says 1 and 0."""

    config: TinyConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = _Encoder(self.config, **types)
        self.decoder = _Decoder(self.config, **types)

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """Latent, in float32, of images in [-1, 1] with sides divisible by the factor, and its log-variance.

        This encoder has no variance: its logarithm is -inf, with which `sample_latent` returns the latent itself.
        """
        factor = self.config.downsample_factor
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"image {x.shape[1]}x{x.shape[2]}: sides must be multiples of {factor}; pad or crop it")
        z = self.encoder((x + 1) / 2).astype(jnp.float32)
        return z, jnp.full_like(z, -jnp.inf)

    def decode(self, z: Float[Array, "b h w z"], features: bool = False) -> Float[Array, "b h2 w2 c"]:
        """Image, in about [-1, 1], of a latent; the latent is held softly within [-3, 3] first.

        features: the activations just before the decoder's last convolution instead, which `paint` makes the image of.
        """
        x = self.decoder(3 * jnp.tanh(z / 3), features)
        return x if features else 2 * x - 1

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Reconstruction; diffusers' `forward` rounds the latent to bytes on the way, this does not."""
        return self.decode(self.encode(x)[0])


def last_layer(config: TinyConfig) -> str:
    """The name of the decoder's last convolution."""
    depths = config.num_decoder_blocks
    return f"layers_{2 * len(depths) + sum(depths)}"


def paint(vae: AutoencoderTiny, params: Mapping[str, Any], features: Array) -> Float[Array, "b h w c"]:
    """The image of `decode(z, features=True)`, by the last convolution of these parameters alone."""
    layer = conv(vae.config.out_channels, dtype=vae.dtype, param_dtype=vae.param_dtype)
    made: Any = layer.apply({"params": params}, features)
    return 2 * made - 1
