"""DINOv2's vision transformer (Oquab et al. 2023, 2304.07193), also with registers (Darcet et al. 2023, 2309.16588).

The parameters are those of transformers' Dinov2Model and Dinov2WithRegistersModel; `RULES_DINOV2` has the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from mmdit.attention import attention
from mmdit.blocks import linear

RULES_DINOV2: tuple[tuple[str, str], ...] = ((r"^encoder/layer_(\d+)/", r"encoder.layer.\1."),)


@dataclass(frozen=True, kw_only=True)
class Dinov2Config:
    """The architecture of a DINOv2 ViT, ViT-B/14 by default; its fields are the keys of transformers' config.json.

    num_register_tokens: None for a network without registers, which is another class in transformers. Raises ValueError
    unless num_attention_heads divides hidden_size, patch_size divides image_size and hidden_act is "gelu".

    >>> from lcm_jax.nets import DINOV2_G, Dinov2Config
    >>> DINOV2_G.hidden_size, DINOV2_G.mlp_width
    (1536, 4096)
    >>> Dinov2Config.from_dict(DINOV2_G.to_dict()) == DINOV2_G
    True
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int | None = None

    def __post_init__(self) -> None:
        for total, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, total) % getattr(self, part):
                raise ValueError(
                    f"Dinov2Config: {total}={getattr(self, total)} is not a multiple of {part}={getattr(self, part)}"
                )
        if self.hidden_act != "gelu":
            raise ValueError(f"Dinov2Config: hidden_act={self.hidden_act!r} is not supported; DINOv2 has 'gelu'")

    @property
    def mlp_width(self) -> int:
        """The width inside the MLP; SwiGLU has two thirds of it, rounded up to a multiple of 8."""
        width = self.hidden_size * self.mlp_ratio
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Dinov2Config:
        """Read the content of a config.json; raises ValueError that names `source` for values it cannot support.

        Keys that are no fields (dropout, the outputs of a backbone) change nothing in a forward pass.
        """
        kind = values.get("model_type", "dinov2")
        if kind not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(f"{source}: model_type is {kind!r}, expected 'dinov2' or 'dinov2_with_registers'")
        known: dict[str, Any] = {"image_size": 224}  # transformers' default where the key is left out
        known |= {name: values[name] for name in (f.name for f in fields(cls)) if values.get(name) is not None}
        if kind == "dinov2":
            known["num_register_tokens"] = None
        else:
            known = {"num_register_tokens": 4} | known | {"use_mask_token": True}
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers loads."""
        values = asdict(self)
        if self.num_register_tokens is None:
            del values["num_register_tokens"]
            return {"model_type": "dinov2", **values}
        del values["use_mask_token"]
        return {"model_type": "dinov2_with_registers", **values}


DINOV2_S = Dinov2Config(hidden_size=384, num_attention_heads=6)
DINOV2_B = Dinov2Config()
DINOV2_L = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)  # that of FD-DINOv2
DINOV2_G = Dinov2Config(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True)


def cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Return the matrix of torch's bicubic interpolation of a line of `old` samples to `new`, without antialiasing.

    Its kernel is Keys' with a = -0.75 (jax.image has -0.5), and the samples at the ends are repeated outside.

    >>> from lcm_jax.nets.dinov2 import cubic_weights
    >>> cubic_weights(4, 2)[0].round(4).tolist()
    [0.5, 0.5938, -0.0938, 0.0]
    """
    a = -0.75
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        x = np.abs(centres - first - offset)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(first + offset, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


class Dinov2(nn.Module):
    """DINOv2's ViT: normalised images (b, h, w, 3) -> tokens (b, 1 + registers + h/p w/p, d) after the final norm.

    Token 0 is the class token, the feature of FD-DINOv2. The sides are multiples of the patch size; the position
    embeddings are interpolated to other sizes than the config's as in transformers: bicubic by size, with antialiasing
    in the network with registers alone. Raises ValueError for sides of another kind.

    >>> import jax, jax.numpy as jnp
    >>> from lcm_jax.nets import Dinov2, Dinov2Config
    >>> net = Dinov2(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> images = jax.ShapeDtypeStruct((2, 28, 42, 3), jnp.float32)
    >>> tokens, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
    >>> tokens.shape
    (2, 7, 8)
    """

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """Return the tokens of the last layer after the final norm."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Embeddings(self.config, name="embeddings", **types)(images)
        x = Encoder(self.config, name="encoder", **types)(x)
        return _norm(self, "layernorm")(x)


class Embeddings(nn.Module):
    """The class token, the registers and the projected patches, with position embeddings on all but the registers."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        c, p = self.config, self.config.patch_size
        b, h, w, channels = images.shape
        if h % p or w % p or min(h, w) < p or channels != c.num_channels:
            raise ValueError(
                f"images are {images.shape[1:]} (height, width, channels): this DINOv2 takes sides that are multiples "
                f"of {p} and {c.num_channels} channels; resize them first"
            )
        x = Patches(c, name="patch_embeddings", dtype=self.dtype, param_dtype=self.param_dtype)(images)
        normal = nn.initializers.truncated_normal(0.02)
        token = self.param("cls_token", normal, (1, 1, c.hidden_size), self.param_dtype).astype(self.dtype)
        if c.use_mask_token:  # of DINOv2's training; files have it, and nothing here reads it
            self.param("mask_token", nn.initializers.zeros, (1, c.hidden_size), self.param_dtype)
        side = c.image_size // p
        places = self.param("position_embeddings", normal, (1, 1 + side**2, c.hidden_size), self.param_dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, c.hidden_size)), x], axis=1)
        x = x + self._places(places, h // p, w // p).astype(self.dtype)
        if c.num_register_tokens is None:
            return x
        shape = (1, c.num_register_tokens, c.hidden_size)
        registers = self.param("register_tokens", nn.initializers.zeros, shape, self.param_dtype).astype(self.dtype)
        return jnp.concatenate([x[:, :1], jnp.broadcast_to(registers, (b, *shape[1:])), x[:, 1:]], axis=1)

    def _places(self, places: Float[Array, "1 m d"], rows: int, columns: int) -> Float[Array, "1 n d"]:
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return places
        grid = rearrange(places[0, 1:].astype(jnp.float32), "(r c) d -> r c d", r=side)
        if self.config.num_register_tokens is None:
            down, along = (jnp.asarray(cubic_weights(side, n), jnp.float32) for n in (rows, columns))
            grid = jnp.einsum("ir,jc,rcd->ijd", down, along, grid, precision="highest")
        else:
            grid = jax.image.resize(grid, (rows, columns, grid.shape[-1]), "bicubic", antialias=True)
        return jnp.concatenate([places[:, :1], rearrange(grid, "r c d -> 1 (r c) d").astype(places.dtype)], axis=1)


class Patches(nn.Module):
    """The projection of patches, a convolution whose stride is its kernel's side."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        c, sides = self.config, (self.config.patch_size,) * 2
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.Conv(c.hidden_size, sides, sides, padding="VALID", name="projection", **types)(images)
        return rearrange(x, "b r c d -> b (r c) d")


class Encoder(nn.Module):
    """The layers, one after the other."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        return x


class Layer(nn.Module):
    """A pre-norm transformer layer whose two branches are scaled channel by channel (layer scale)."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Attention(self.config, name="attention", **types)(_norm(self, "norm1")(x))
        x = x + LayerScale(self.config, name="layer_scale1", **types)(y)
        y = MLP(self.config, name="mlp", **types)(_norm(self, "norm2")(x))
        return x + LayerScale(self.config, name="layer_scale2", **types)(y)


class LayerScale(nn.Module):
    """A gain for each channel, y = lambda1 x (Touvron et al. 2021, 2103.17239)."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        constant = nn.initializers.constant(self.config.layerscale_value)
        return x * self.param("lambda1", constant, (self.config.hidden_size,), self.param_dtype).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention and its projection, transformers' attention.attention and attention.output."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Heads(self.config, name="attention", **types)(x)
        return Projection(self.config, name="output", **types)(x)


class Heads(nn.Module):
    """The heads of self-attention, side by side."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        c = self.config
        q, k, v = (
            rearrange(
                _linear(self, c.hidden_size, name, use_bias=c.qkv_bias)(x),
                "b n (h d) -> b n h d",
                h=c.num_attention_heads,
            )
            for name in ("query", "key", "value")
        )
        return rearrange(attention(q, k, v), "b n h d -> b n (h d)")


class Projection(nn.Module):
    """The dense layer after the heads."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return _linear(self, self.config.hidden_size, "dense")(x)


class MLP(nn.Module):
    """The MLP of a layer: fc2(gelu(fc1(x))), or SwiGLU, weights_out(silu(gate) up) (Shazeer 2020, 2002.05202)."""

    config: Dinov2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        c = self.config
        if c.use_swiglu_ffn:
            gate, up = jnp.split(_linear(self, 2 * c.mlp_width, "weights_in")(x), 2, axis=-1)
            return _linear(self, c.hidden_size, "weights_out")(jax.nn.silu(gate) * up)
        x = jax.nn.gelu(_linear(self, c.mlp_width, "fc1")(x), approximate=False)
        return _linear(self, c.hidden_size, "fc2")(x)


def _linear(block: Any, width: int, name: str, **options: Any) -> nn.Dense:
    kernel = nn.initializers.truncated_normal(0.02)
    return linear(width, name, block.dtype, block.param_dtype, kernel_init=kernel, **options)


def _norm(block: Any, name: str) -> nn.LayerNorm:
    types = dict(dtype=block.dtype, param_dtype=block.param_dtype)
    return nn.LayerNorm(epsilon=block.config.layer_norm_eps, use_fast_variance=False, name=name, **types)
