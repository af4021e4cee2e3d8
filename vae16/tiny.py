"""AutoencoderTiny: TAESD (Bohan 2023, github.com/madebyollin/taesd), a distilled autoencoder for previews and streams.

It has convolutions and ReLU only. Its latents are in the diffusion network's units: `scale` and `unscale` do not change
them.
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
    """The architecture of an AutoencoderTiny: the keys of diffusers' config.json; the defaults are TAESD and TAESDXL.

    latent_magnitude, latent_shift: z / (2 magnitude) + shift is in [0, 1], for storing latents as bytes; neither
    encode nor decode uses them. act_fn: between the convolutions of a block; after its sum there is always a ReLU.
    Raises ValueError unless each half has one width, one depth for each entry of its widths, a known act_fn, and the
    decoder enlarges as much as the encoder shrinks.

    >>> from vae16 import TAESD, TAESD3, TinyConfig
    >>> TAESD.downsample_factor, TAESD.latent_channels, TAESD3.latent_channels
    (8, 4, 16)
    >>> TinyConfig.from_dict(TAESD3.to_dict()) == TAESD3
    True
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
                raise ValueError(f"{width}: {list(widths)} must repeat one width: no layer changes the width")
            if len(widths) != len(depths):
                raise ValueError(
                    f"{depth}: {list(depths)} has {len(depths)} entries, but {width} has {len(widths)}; use one length"
                )
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn: {self.act_fn!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
        up = self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
        if up != self.downsample_factor:
            raise ValueError(
                f"num_decoder_blocks: the decoder enlarges by {up}, but the encoder shrinks by {self.downsample_factor}"
            )

    @property
    def downsample_factor(self) -> int:
        """The number of pixels per latent position along one side."""
        return int(2 ** (len(self.num_encoder_blocks) - 1))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], *, source: str = "config.json") -> TinyConfig:
        """Read the content of a config.json.

        Raises ValueError that names `source` and the key whose value would change the result and is not supported.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in d.items():
            if key in known:
                values[key] = tuple(value) if key in _WIDTHS + _DEPTHS else value
            elif key == "upsample_fn" and value != "nearest":
                raise ValueError(f"{source}: upsample_fn: {value!r} is not supported; only 'nearest' is")
            # diffusers writes the decoder's widths as block_out_channels too, and does not read that key.
            elif key not in ("upsample_fn", "block_out_channels") and not key.startswith("_") and value is not None:
                raise ValueError(f"{source}: {key}={value!r} is not supported by AutoencoderTiny; remove it if unused")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that diffusers loads."""
        lists = {key: list(getattr(self, key)) for key in _WIDTHS + _DEPTHS}
        return {"_class_name": "AutoencoderTiny"} | asdict(self) | lists


TAESD = TinyConfig()
TAESD3 = TinyConfig(latent_channels=16)


class _Block(nn.Module):
    """A residual block: the ReLU of x plus three 3x3 convolutions of x."""

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
    """Count layer names by their index in torch's Sequential."""
    return (f"layers_{i}" for i in count())


class _Encoder(nn.Module):
    """The network from an image (b, h, w, c) in [0, 1] to a latent (b, h/f, w/f, z)."""

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
    """The network from a latent (b, h, w, z) to an image (b, f h, f w, c) in [0, 1]."""

    config: TinyConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"], features: bool = False) -> Float[Array, "b h2 w2 c"]:
        c, names = self.config, _names()
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, factor = c.decoder_block_out_channels[0], c.upsampling_scaling_factor
        x = ACTIVATIONS[c.act_fn](conv(width, **types, name=next(names))(z))
        next(names)  # the activation has an index in the Sequential too, and so has each enlargement below
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
    """The tiny autoencoder (TAESD), with the methods of AutoencoderKL.

    Its latents need no scaling: scaling_factor is 1 and shift_factor 0.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import AutoencoderTiny, TinyConfig
    >>> blocks = {f"{half}_block_out_channels": (4, 4) for half in ("encoder", "decoder")}
    >>> vae = AutoencoderTiny(TinyConfig(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    >>> image, variables = jax.eval_shape(vae.init_with_output, jax.random.key(0), x)
    >>> z, _ = jax.eval_shape(lambda v, x: vae.apply(v, x, method="encode"), variables, x)
    >>> z.shape, image.shape
    ((1, 4, 4, 4), (1, 8, 8, 3))
    """

    config: TinyConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = _Encoder(self.config, **types)
        self.decoder = _Decoder(self.config, **types)

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """Return the latent of images in [-1, 1], in float32, and its log-variance.

        This encoder has no variance: the log-variance is -inf, with which `sample_latent` returns the latent itself.
        Raises ValueError unless both sides are multiples of `config.downsample_factor`.
        """
        factor = self.config.downsample_factor
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"image {x.shape[1]}x{x.shape[2]}: sides must be multiples of {factor}; pad or crop it")
        z = self.encoder((x + 1) / 2).astype(jnp.float32)
        return z, jnp.full_like(z, -jnp.inf)

    def decode(self, z: Float[Array, "b h w z"], features: bool = False) -> Float[Array, "b h2 w2 c"]:
        """Return the image, in about [-1, 1], of a latent z, which is first limited to [-3, 3] as 3 tanh(z / 3).

        With `features`, return the activations just before the decoder's last convolution; `paint` turns these into
        the image.
        """
        x = self.decoder(3 * jnp.tanh(z / 3), features)
        return x if features else 2 * x - 1

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the reconstruction; unlike diffusers' `forward`, without rounding the latent to bytes."""
        return self.decode(self.encode(x)[0])


def last_layer(config: TinyConfig) -> str:
    """Return the name of the decoder's last convolution in its parameter tree."""
    depths = config.num_decoder_blocks
    return f"layers_{2 * len(depths) + sum(depths)}"


def paint(vae: AutoencoderTiny, params: Mapping[str, Any], features: Array) -> Float[Array, "b h w c"]:
    """Return the image of the activations `decode(z, features=True)`.

    params: those of the decoder's last convolution, params["decoder"][last_layer(config)].
    """
    layer = conv(vae.config.out_channels, dtype=vae.dtype, param_dtype=vae.param_dtype)
    image: Any = layer.apply({"params": params}, features)
    return 2 * image - 1
