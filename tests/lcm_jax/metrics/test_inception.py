from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lcm_jax.metrics.inception import RULES_INCEPTION, InceptionV3, inception_features, load_inception
from lcm_jax.weights.torch_params import to_torch

torch = pytest.importorskip("torch")
F = torch.nn.functional


def oracle(w, images):
    """pytorch-fid's network written out over a dictionary of tensors; images (b, 3, h, w) in [0, 1]."""

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        bn = [w[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *bn, eps=1e-3))

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(x, m):
        five = conv(conv(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", padding=2)
        three = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", padding=1)
        three = conv(three, f"{m}.branch3x3dbl_3", padding=1)
        return torch.cat([conv(x, f"{m}.branch1x1"), five, three, conv(average(x), f"{m}.branch_pool")], 1)

    def b(x, m):
        three = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", padding=1)
        three = conv(three, f"{m}.branch3x3dbl_3", 2)
        return torch.cat([conv(x, f"{m}.branch3x3", 2), three, F.max_pool2d(x, 3, 2)], 1)

    def c(x, m):
        s = conv(conv(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", padding=(0, 3))
        s = conv(s, f"{m}.branch7x7_3", padding=(3, 0))
        d = conv(x, f"{m}.branch7x7dbl_1")
        for i, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)]):
            d = conv(d, f"{m}.branch7x7dbl_{i + 2}", padding=padding)
        return torch.cat([conv(x, f"{m}.branch1x1"), s, d, conv(average(x), f"{m}.branch_pool")], 1)

    def d(x, m):
        three = conv(conv(x, f"{m}.branch3x3_1"), f"{m}.branch3x3_2", 2)
        s = conv(conv(x, f"{m}.branch7x7x3_1"), f"{m}.branch7x7x3_2", padding=(0, 3))
        s = conv(conv(s, f"{m}.branch7x7x3_3", padding=(3, 0)), f"{m}.branch7x7x3_4", 2)
        return torch.cat([three, s, F.max_pool2d(x, 3, 2)], 1)

    def e(x, m, pool):
        t = conv(x, f"{m}.branch3x3_1")
        t = [conv(t, f"{m}.branch3x3_2a", padding=(0, 1)), conv(t, f"{m}.branch3x3_2b", padding=(1, 0))]
        u = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", padding=1)
        u = [conv(u, f"{m}.branch3x3dbl_3a", padding=(0, 1)), conv(u, f"{m}.branch3x3dbl_3b", padding=(1, 0))]
        return torch.cat([conv(x, f"{m}.branch1x1"), *t, *u, conv(pool(x), f"{m}.branch_pool")], 1)

    x = 2 * F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) - 1
    x = conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", padding=1), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(x, m)
    x = b(x, "Mixed_6a")
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(x, m)
    x = e(d(x, "Mixed_7a"), "Mixed_7b", average)
    return e(x, "Mixed_7c", lambda z: F.max_pool2d(z, 3, 1, 1)).mean((2, 3))


@pytest.fixture(scope="module")
def weights():
    """Random weights that keep activations near one, under the names of the published file."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))["params"]

    def leaf(path, x):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(scale=np.sqrt(2 / np.prod(x.shape[:3])), size=x.shape).astype(np.float32)
        low, high = (-0.1, 0.1) if name in ("bias", "mean") else (0.8, 1.2)
        return rng.uniform(low, high, x.shape).astype(np.float32)

    return to_torch(jax.tree_util.tree_map_with_path(leaf, like), RULES_INCEPTION)


def test_names_are_those_of_the_published_file(weights):
    assert len(weights) == 94 * 5  # 94 convolutions with four statistics each
    for name in (
        "Conv2d_1a_3x3.conv.weight",
        "Conv2d_2b_3x3.bn.running_mean",
        "Mixed_5b.branch5x5_2.bn.running_var",
        "Mixed_6e.branch7x7dbl_5.bn.weight",
        "Mixed_7c.branch3x3dbl_3b.bn.bias",
    ):
        assert name in weights


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 320])  # enlarged and shrunk to 299
def test_features_agree_with_torch(weights, size, tmp_path):
    extra = {
        "fc.weight": np.zeros((1008, 2048), np.float32),
        "Mixed_5b.branch1x1.bn.num_batches_tracked": np.int64([1]),
    }
    save_file(weights | extra, tmp_path / "inception.safetensors")
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    found = inception_features(tmp_path / "inception.safetensors", batch_size=2)(images)
    torch.set_num_threads(1)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        expected = oracle(tensors, torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255))).numpy()
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_file_without_a_layer_is_refused(weights, tmp_path):
    short = {k: v for k, v in weights.items() if k != "Mixed_6a.branch3x3.conv.weight"}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"short\.safetensors.*Mixed_6a\.branch3x3\.conv\.weight"):
        load_inception(tmp_path / "short.safetensors")
