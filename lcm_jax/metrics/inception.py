"""Inception-v3 as FID uses it: the 2015 TensorFlow graph in pytorch-fid's layout, up to the 2048 pooled features.

It differs from torchvision's network in its poolings: average pools do not count the padding, and the last block
(Mixed_7c) has a max pool. Weights: a safetensors copy of `pt_inception-2015-12-05`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.metrics.features import NetworkFeatures
from lcm_jax.typing import Params
from lcm_jax.weights.safetensors_files import read_safetensors
from lcm_jax.weights.torch_params import from_torch

SIZE = 299  # pixels
RULES_INCEPTION: tuple[tuple[str, str], ...] = ((r"/bn/(mean|var)$", r"/bn/running_\1"),)
OPTIONAL_INCEPTION = (r"^fc\.", r"^AuxLogits\.", r"\.num_batches_tracked$")


class FrozenBatchNorm(nn.Module):
    """Batch norm in evaluation: an affine map whose parameters include the running statistics; TensorFlow's eps."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        gain = scale * jax.lax.rsqrt(var + 1e-3)
        return x * gain + (bias - mean * gain)


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU (torchvision's BasicConv2d)."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        conv = nn.Conv(self.features, self.kernel, self.stride, padding=self.padding, use_bias=False, name="conv")
        return nn.relu(FrozenBatchNorm(name="bn")(conv(x)))


def _average(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_same(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _max_down(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


# A branch is its layers in order: (name, features, kernel, stride). Strided convolutions are unpadded.
Layer = tuple[str, int, tuple[int, int], int]


def _chain(x: Float[Array, "b h w c"], layers: Sequence[Layer]) -> Float[Array, "b i j d"]:
    for name, features, kernel, stride in layers:
        x = ConvBN(features, kernel, stride, "SAME" if stride == 1 else "VALID", name=name)(x)
    return x


class MixedA(nn.Module):
    pool: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        five = [("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)]
        double = [
            ("branch3x3dbl_1", 64, (1, 1), 1),
            ("branch3x3dbl_2", 96, (3, 3), 1),
            ("branch3x3dbl_3", 96, (3, 3), 1),
        ]
        one = ConvBN(64, name="branch1x1")(x)
        pooled = ConvBN(self.pool, name="branch_pool")(_average(x))
        return jnp.concatenate([one, _chain(x, five), _chain(x, double), pooled], axis=-1)


class MixedB(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        double = [
            ("branch3x3dbl_1", 64, (1, 1), 1),
            ("branch3x3dbl_2", 96, (3, 3), 1),
            ("branch3x3dbl_3", 96, (3, 3), 2),
        ]
        three = _chain(x, [("branch3x3", 384, (3, 3), 2)])
        return jnp.concatenate([three, _chain(x, double), _max_down(x)], axis=-1)


class MixedC(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        w = self.width
        seven = [("branch7x7_1", w, (1, 1), 1), ("branch7x7_2", w, (1, 7), 1), ("branch7x7_3", 192, (7, 1), 1)]
        double = [
            ("branch7x7dbl_1", w, (1, 1), 1),
            ("branch7x7dbl_2", w, (7, 1), 1),
            ("branch7x7dbl_3", w, (1, 7), 1),
            ("branch7x7dbl_4", w, (7, 1), 1),
            ("branch7x7dbl_5", 192, (1, 7), 1),
        ]
        one = ConvBN(192, name="branch1x1")(x)
        pooled = ConvBN(192, name="branch_pool")(_average(x))
        return jnp.concatenate([one, _chain(x, seven), _chain(x, double), pooled], axis=-1)


class MixedD(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        three = [("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)]
        seven = [
            ("branch7x7x3_1", 192, (1, 1), 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ]
        return jnp.concatenate([_chain(x, three), _chain(x, seven), _max_down(x)], axis=-1)


class MixedE(nn.Module):
    max_pool: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        three = ConvBN(384, name="branch3x3_1")(x)
        double = _chain(x, [("branch3x3dbl_1", 448, (1, 1), 1), ("branch3x3dbl_2", 384, (3, 3), 1)])
        parts = [
            ConvBN(320, name="branch1x1")(x),
            ConvBN(384, (1, 3), name="branch3x3_2a")(three),
            ConvBN(384, (3, 1), name="branch3x3_2b")(three),
            ConvBN(384, (1, 3), name="branch3x3dbl_3a")(double),
            ConvBN(384, (3, 1), name="branch3x3dbl_3b")(double),
            ConvBN(192, name="branch_pool")(_max_same(x) if self.max_pool else _average(x)),
        ]
        return jnp.concatenate(parts, axis=-1)


class InceptionV3(nn.Module):
    """Pictures (b, h, w, 3) in [-1, 1] -> pool3 features (b, 2048). Resizes bilinearly to 299 x 299 itself."""

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        b, _, _, c = images.shape
        # Half-pixel centres and no antialiasing, as torch's interpolate(align_corners=False) in pytorch-fid.
        x = jax.image.resize(images, (b, SIZE, SIZE, c), "bilinear", antialias=False)
        x = ConvBN(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvBN(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _max_down(ConvBN(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = ConvBN(80, name="Conv2d_3b_1x1")(x)
        x = _max_down(ConvBN(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = MixedA(pool, name=name)(x)
        x = MixedB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = MixedC(width, name=name)(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(False, name="Mixed_7b")(x)
        x = MixedE(True, name="Mixed_7c")(x)
        return x.mean(axis=(1, 2))


def load_inception(path: str | Path) -> Params:
    """Parameters of `InceptionV3` from a safetensors file with torchvision's key names (the classifier is ignored)."""
    like = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return from_torch(read_safetensors(path), like, RULES_INCEPTION, optional=OPTIONAL_INCEPTION, source=str(path))


def inception_features(path: str | Path, *, batch_size: int = 32) -> NetworkFeatures:
    """The FID feature extractor, its weights read from `path`."""
    net = InceptionV3()

    def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        return jnp.asarray(net.apply({"params": params}, images))

    return NetworkFeatures(apply=apply, params=load_inception(path), batch_size=batch_size)
