"""What each model family reads from its text encoders."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit.text.clip import CLIPTextModel
from mmdit.text.clip_config import CLIPTextConfig
from mmdit.text.conditioning import Encoding, sd3, sdxl, size_ids, stable_diffusion, zero_prompt
from mmdit.text.t5 import T5Encoder
from mmdit.text.t5_config import T5Config

L = CLIPTextConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=12,
    vocab_size=64,
    max_position_embeddings=8,
    bos_token_id=62,
    eos_token_id=63,
)
G = dataclasses.replace(L, hidden_size=24, hidden_act="gelu", projection_dim=20)
IDS = jnp.asarray([[62, 5, 9, 11, 63, 63, 63, 63], [62, 30, 63, 63, 63, 63, 63, 63]])
TIME = size_ids((512, 640), (8, 16), (256, 320), batch=2)


def run(module, params):
    return jax.jit(module.apply)({"params": params}, IDS)


def context(encoding, **options):
    return jax.jit(lambda p: stable_diffusion(encoding._replace(params=p), **options)["context"])(encoding.params)


@pytest.fixture(scope="module")
def first(random_params):
    module = CLIPTextModel(L)
    return Encoding(module, random_params(module.init, IDS)["params"], IDS)


@pytest.fixture(scope="module")
def second(random_params):
    module = CLIPTextModel(G, projection=True)
    return Encoding(module, random_params(module.init, IDS, seed=1)["params"], IDS)


@pytest.fixture(scope="module")
def condition(first, second):
    def together(p, q):
        return sdxl([first._replace(params=p), second._replace(params=q)], TIME)

    return jax.jit(together)(first.params, second.params)


def test_stable_diffusion_reads_the_last_normed_layer_whatever_the_module_was_built_for(first):
    other = first._replace(module=first.module.clone(hidden_layer=-2, final_norm=False))
    wanted = run(first.module, first.params).last_hidden
    np.testing.assert_allclose(context(other), wanted, atol=1e-5)


def test_skipping_layers_keeps_the_final_norm(first):
    skipped = context(first, clip_skip=1)
    out = run(first.module.clone(hidden_layer=-2, final_norm=True), first.params)
    np.testing.assert_allclose(skipped, out.hidden, atol=1e-5)
    assert jnp.abs(skipped - out.last_hidden).max() > 1e-3


def test_sdxl_joins_penultimate_layers_and_pools_the_second_encoder(first, second, condition):
    assert condition["context"].shape == (2, 8, 16 + 24)
    assert condition["pooled"].shape == (2, 20)
    for e, part in ((first, condition["context"][..., :16]), (second, condition["context"][..., 16:])):
        out = run(e.module.clone(hidden_layer=-2, final_norm=False), e.params)
        np.testing.assert_allclose(part, out.hidden, atol=1e-5)
    np.testing.assert_allclose(condition["pooled"], out.text_embeds, atol=1e-5)
    np.testing.assert_array_equal(condition["time_ids"], TIME)


def test_size_ids_are_height_before_width():
    np.testing.assert_array_equal(TIME, [[512, 640, 8, 16, 256, 320]] * 2)
    np.testing.assert_array_equal(size_ids((64, 32)), [[64, 32, 0, 0, 64, 32]])


def test_the_zero_prompt_keeps_the_sizes(condition):
    null = zero_prompt(condition)
    assert not null["context"].any()
    assert not null["pooled"].any()
    np.testing.assert_array_equal(null["time_ids"], TIME)


def test_wrong_encoders_are_named(first, second):
    with pytest.raises(ValueError, match="projection=True"):
        jax.eval_shape(lambda: sdxl([second, first], TIME))
    with pytest.raises(ValueError, match="differ in shape"):
        jax.eval_shape(lambda: sdxl([first, second._replace(ids=IDS[:, :4])], TIME))
    with pytest.raises(ValueError, match="no text encoder"):
        sdxl([], TIME)


T5 = T5Config(vocab_size=64, d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
T5_IDS = jnp.asarray([[5, 9, 1, 0, 0, 0], [30, 1, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def projected(random_params):
    module = CLIPTextModel(L, projection=True)
    return Encoding(module, random_params(module.init, IDS)["params"], IDS)


@pytest.fixture(scope="module")
def third(random_params):
    module = T5Encoder(T5)
    return Encoding(module, random_params(module.init, T5_IDS, seed=2)["params"], T5_IDS)


def test_sd3_joins_clips_on_channels_and_t5_on_tokens(projected, second, third):
    def together(p, q, r):
        clips = [projected._replace(params=p), second._replace(params=q)]
        return sd3(clips, third._replace(params=r), width=48, t5_tokens=6)

    both = jax.jit(together)(projected.params, second.params, third.params)
    assert both["context"].shape == (2, 8 + 6, 48)
    sides = zip((projected, second), (slice(0, 16), slice(16, 40)), (slice(0, 12), slice(12, 32)), strict=True)
    for encoding, channels, pooled in sides:
        out = run(encoding.module.clone(hidden_layer=-2, final_norm=False), encoding.params)
        np.testing.assert_allclose(both["context"][:, :8, channels], out.hidden, atol=1e-5)
        np.testing.assert_allclose(both["pooled"][:, pooled], out.text_embeds, atol=1e-5)
    assert not both["context"][:, :8, 40:].any()
    states = jax.jit(third.module.apply)({"params": third.params}, T5_IDS)
    np.testing.assert_allclose(both["context"][:, 8:], states, atol=1e-5)


def test_sd3_without_t5_has_zeros_in_its_place(projected, second):
    without = jax.jit(lambda: sd3([projected, second], None, width=48, t5_tokens=6))()
    assert without["context"].shape == (2, 14, 48)
    assert not without["context"][:, 8:].any()


def test_sd3_says_what_does_not_fit(projected, first, second, third):
    with pytest.raises(ValueError, match="40 wide together, more than the context's 32"):
        jax.eval_shape(lambda: sd3([projected, second], None, width=32, t5_tokens=6))
    with pytest.raises(ValueError, match="needs projection=True"):
        jax.eval_shape(lambda: sd3([first, second], None, width=48, t5_tokens=6))
    with pytest.raises(ValueError, match=r"T5 gives \(tokens, width\) = \(6, 48\)"):
        jax.eval_shape(lambda: sd3([projected, second], third, width=48, t5_tokens=5))
