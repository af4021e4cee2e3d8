"""Inception-v3 (Szegedy 2015, arXiv:1512.00567) as FID uses it: up to the 2048 pooled features.

It is the TensorFlow graph of 2015 in pytorch-fid's layout. It differs from torchvision's network in its poolings:
average pools do not count the padding, and the last block (Mixed_7c) has a max pool. Weights: a safetensors copy of
`pt_inception-2015-12-05`.
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
    """Batch norm in evaluation, y = scale (x - mean) / sqrt(var + 0.001) + bias.

    The running statistics `mean` and `var` are parameters, and 0.001 is TensorFlow's epsilon.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return x normalised channel by channel."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        gain = scale * jax.lax.rsqrt(var + 1e-3)
        return x * gain + (bias - mean * gain)


class ConvBN(nn.Module):
    """A convolution without bias, batch norm and ReLU, y = relu(norm(conv(x))) (torchvision's BasicConv2d)."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Return `features` channels; without padding the picture becomes smaller."""
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
    """A block with branches of 1 x 1, 5 x 5 and twice 3 x 3 (torchvision's InceptionA): c -> 224 + pool channels."""

    pool: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Return the branches' channels side by side."""
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
    """A block that halves the resolution with 3 x 3 branches (torchvision's InceptionB): c -> 480 + c channels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Return the branches' channels and the max-pooled input side by side."""
        double = [
            ("branch3x3dbl_1", 64, (1, 1), 1),
            ("branch3x3dbl_2", 96, (3, 3), 1),
            ("branch3x3dbl_3", 96, (3, 3), 2),
        ]
        three = _chain(x, [("branch3x3", 384, (3, 3), 2)])
        return jnp.concatenate([three, _chain(x, double), _max_down(x)], axis=-1)


class MixedC(nn.Module):
    """A block of 7 x 7 kernels factorised into 1 x 7 and 7 x 1 (torchvision's InceptionC): c -> 768 channels."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Return the branches' channels side by side."""
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
    """A block that halves the resolution with 3 x 3 and 7 x 7 branches (torchvision's InceptionD): c -> 512 + c."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Return the branches' channels and the max-pooled input side by side."""
        three = [("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)]
        seven = [
            ("branch7x7x3_1", 192, (1, 1), 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ]
        return jnp.concatenate([_chain(x, three), _chain(x, seven), _max_down(x)], axis=-1)


class MixedE(nn.Module):
    """A block whose 3 x 3 kernels fork into 1 x 3 and 3 x 1 (torchvision's InceptionE): c -> 2048 channels."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Return the branches' channels side by side."""
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
    """The network of FID: pictures (b, h, w, 3) in [-1, 1] -> pool3 features (b, 2048).

    It resizes the pictures bilinearly to 299 x 299 pixels itself (Szegedy 2015, arXiv:1512.00567).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics import InceptionV3
    >>> images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    >>> features, _ = jax.eval_shape(InceptionV3().init_with_output, jax.random.key(0), images)
    >>> features.shape
    (2, 2048)
    """

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Return the mean of the last block's features over the picture."""
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
    """Return the parameters of `InceptionV3` from a safetensors file with torchvision's key names.

    path: a file -> a tree for `InceptionV3().apply({"params": tree}, images)`. The classifier in it is ignored.
    Raises ValueError, which names the file and the key, if a layer is missing or has a wrong shape.
    """
    like = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return from_torch(read_safetensors(path), like, RULES_INCEPTION, optional=OPTIONAL_INCEPTION, source=str(path))


def inception_features(path: str | Path, *, batch_size: int = 32) -> NetworkFeatures:
    """Return the feature extractor of FID (Heusel 2017, arXiv:1706.08500) with the weights of the file `path`.

    inception_features(path): uint8 pictures (n, h, w, 3) -> float32 features (n, 2048). The file and the errors are
    those of `load_inception`.
    """
    net = InceptionV3()

    def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        return jnp.asarray(net.apply({"params": params}, images))

    return NetworkFeatures(apply=apply, params=load_inception(path), batch_size=batch_size, distance="FID")
