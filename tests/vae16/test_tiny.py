"""Laws of the tiny autoencoder."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae16 import (
    TAESD,
    TAESD3,
    TINY_ORIGINAL_RULES,
    TINY_RULES,
    AutoencoderTiny,
    TinyConfig,
    sample_latent,
    scale,
    unscale,
)
from vae16.tiny import last_layer, paint

SMALL = TinyConfig(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(6, 6, 6),
    num_encoder_blocks=(1, 2, 0),
    num_decoder_blocks=(2, 0, 1),
    latent_channels=5,
)


@pytest.fixture(scope="module")
def small():
    """Parameters, an image, and the two directions, each compiled once."""
    vae = AutoencoderTiny(SMALL)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(-1, 1, (2, 16, 24, 3)), jnp.float32)
    like = jax.eval_shape(vae.init, jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.15 * random.standard_normal(leaf.shape), leaf.dtype), like)
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))
    decode = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))
    return params, x, encode, decode


def test_decoding_an_encoding_keeps_the_shape(small):
    params, x, encode, decode = small
    assert SMALL.downsample_factor == 4
    z, logvar = encode(params, x)
    assert z.shape == logvar.shape == (2, 4, 6, 5)
    assert decode(params, z).shape == x.shape
    full = jax.jit(AutoencoderTiny(SMALL).apply)({"params": params}, x)
    np.testing.assert_allclose(full, decode(params, z), rtol=1e-4, atol=1e-4)


def test_features_and_the_last_convolution_are_the_decoder(small):
    params, _, _, decode = small
    vae, z = AutoencoderTiny(SMALL), jnp.asarray(np.random.default_rng(4).standard_normal((2, 4, 6, 5)), jnp.float32)
    features = jax.jit(lambda p, z: vae.apply({"params": p}, z, features=True, method="decode"))(params, z)
    assert features.shape == (2, 16, 24, 6)
    painted = paint(vae, params["decoder"][last_layer(SMALL)], features)
    np.testing.assert_allclose(painted, decode(params, z), rtol=1e-5, atol=1e-5)


def test_the_latent_is_certain_and_needs_no_scaling(small):
    params, x, encode, _ = small
    z, logvar = encode(params, x)
    np.testing.assert_array_equal(sample_latent(z, logvar, jax.random.key(3)), z)
    np.testing.assert_array_equal(scale(z, SMALL), z)
    np.testing.assert_array_equal(unscale(z, SMALL), z)


def test_latents_are_held_within_three(small):
    """The clamp is 3 tanh(z / 3): saturated far out, without effect near zero."""
    params, _, _, decode = small
    z = np.sign(np.random.default_rng(2).standard_normal((2, 4, 6, 5))).astype(np.float32)
    np.testing.assert_array_equal(decode(params, 1e3 * z), decode(params, 1e6 * z))
    assert jnp.abs(decode(params, 3 * z) - decode(params, 1e3 * z)).max() > 1e-3


def test_black_is_zero_and_white_is_one_inside():
    """Images run over [-1, 1] outside: one stage without blocks is two convolutions, undone by hand."""
    widths = {"encoder_block_out_channels": (3,), "decoder_block_out_channels": (3,), "latent_channels": 3}
    vae = AutoencoderTiny(TinyConfig(**widths, num_encoder_blocks=(0,), num_decoder_blocks=(0,)))
    x = np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32)
    like = jax.eval_shape(vae.init, jax.random.key(1), x)["params"]
    centre = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    params = jax.tree.map(lambda leaf: centre if leaf.ndim == 4 else jnp.zeros(leaf.shape), like)
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode")[0])
    decode = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))
    z = encode(params, x)
    np.testing.assert_allclose(z, (x + 1) / 2, atol=1e-6)
    np.testing.assert_allclose(decode(params, z), 2 * 3 * np.tanh(z / 3) - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"), [(TAESD, 1_222_532, 1_222_531), (TAESD3, 1_229_456, 1_229_443)]
)
def test_published_geometries_have_the_published_size(config, encoder, decoder):
    shapes = jax.eval_shape(AutoencoderTiny(config).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert config.downsample_factor == 8
    for half, count in (("encoder", encoder), ("decoder", decoder)):
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes[half])) == count


def test_half_precision_follows_float32(small):
    params, x, encode, decode = small
    half = AutoencoderTiny(SMALL, dtype=jnp.bfloat16)
    z, _ = jax.jit(lambda p, x: half.apply({"params": p}, x, method="encode"))(params, x)
    exact, _ = encode(params, x)
    assert z.dtype == jnp.float32
    assert jnp.abs(z - exact).max() < 0.05 * jnp.abs(exact).max()
    image = jax.jit(lambda p, z: half.apply({"params": p}, z, method="decode"))(params, exact)
    assert image.dtype == jnp.bfloat16
    wanted = decode(params, exact)
    assert jnp.abs(image - wanted).max() < 0.05 * jnp.abs(wanted).max()


def renamed(path, rules):
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


def test_names_in_both_conventions():
    """TAESD's two Sequentials written out: the original decoder has its clamp at place 0, diffusers' has none."""
    # c convolution, r residual block, t tanh clamp, a activation, u enlargement
    sequentials = {"encoder": ("cr" + "crrr" * 3 + "c", 0), "decoder": ("tca" + "rrruc" * 3 + "rc", 1)}
    inside = {"r": (".conv.0", ".conv.2", ".conv.4"), "c": ("",)}
    shapes = jax.eval_shape(AutoencoderTiny(TAESD).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    original, ours = set(), set()
    for half, (layers, shift) in sequentials.items():
        for i, kind in enumerate(layers):
            for rest in inside.get(kind, ()):
                original.add(f"{half}.{i}{rest}")
                ours.add(f"{half}.layers.{i - shift}{rest}")
    for rules, want in ((TINY_ORIGINAL_RULES, original), (TINY_RULES, ours)):
        assert {renamed(path, rules).rpartition(".")[0] for path in paths} == want
        assert len({renamed(path, rules) for path in paths}) == len(paths)


def test_config_round_trip():
    assert TinyConfig.from_dict(SMALL.to_dict()) == SMALL
    theirs = {"_class_name": "AutoencoderTiny", "block_out_channels": [64] * 4, "upsample_fn": "nearest"}
    assert TinyConfig.from_dict(theirs) == TAESD


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "elu"}, "act_fn: 'elu'"),
        ({"upsample_fn": "bilinear"}, "bilinear"),
        ({"use_midblock_gn": True}, "use_midblock_gn"),
        ({"encoder_block_out_channels": [8, 8, 4]}, "encoder_block_out_channels"),
        ({"encoder_block_out_channels": [], "num_encoder_blocks": []}, "encoder_block_out_channels"),
        ({"num_decoder_blocks": [1, 1]}, "num_decoder_blocks"),
        ({"upsampling_scaling_factor": 3}, "enlarges by 9"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        TinyConfig.from_dict(SMALL.to_dict() | change, source="vae/config.json")
    assert str(caught.value).startswith("vae/config.json")
    assert "\n" not in str(caught.value)


def test_the_activation_is_used(small):
    params, x, encode, _ = small
    other = AutoencoderTiny(dataclasses.replace(SMALL, act_fn="gelu"))
    z, _ = jax.jit(lambda p, x: other.apply({"params": p}, x, method="encode"))(params, x)
    assert jnp.abs(z - encode(params, x)[0]).max() > 1e-3


def test_sides_must_fit_the_factor(small):
    params, _, encode, _ = small
    with pytest.raises(ValueError, match="multiples of 4"):
        encode(params, jnp.zeros((1, 18, 16, 3)))
