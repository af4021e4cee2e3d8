"""Laws of the CLIP towers."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit.rules import RULES_CLIP_TEXT
from mmdit.text.clip import CLIPModel, CLIPTextModel, CLIPVisionModel, eos_position, normalize_images
from mmdit.text.clip_config import CLIP_BIGG, CLIP_H, CLIP_L, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

EOS = 63
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=12)
TEXT = CLIPTextConfig(**SMALL, vocab_size=64, max_position_embeddings=8, bos_token_id=62, eos_token_id=EOS)
VISION = CLIPVisionConfig(**SMALL, image_size=16, patch_size=8)
IDS = jnp.asarray([[62, 5, 9, 11, EOS, EOS, EOS, EOS], [62, 30, EOS, EOS, EOS, EOS, EOS, EOS]])


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CLIPModel(config=CLIPConfig(text=TEXT, vision=VISION)).init)


@pytest.fixture(scope="module")
def text(params):
    module = CLIPTextModel(TEXT, projection=True)
    return jax.jit(lambda ids: module.apply({"params": params}, ids))


def run(module, params, ids=IDS):
    return jax.jit(module.apply)({"params": params}, ids)


def stack(params):
    """encoder/layers_i/... -> encoder/layers/..."""

    def walk(tree):
        if not isinstance(tree, dict):
            return tree
        if "layers_0" not in tree:
            return {name: walk(child) for name, child in tree.items()}
        layers = [tree[f"layers_{i}"] for i in range(TEXT.num_hidden_layers)]
        return {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}

    return walk(params)


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_a_later_token_never_changes_an_earlier_state(text):
    before = text(IDS).last_hidden
    for at in range(1, IDS.shape[1]):
        after = text(IDS.at[:, at].set(17)).last_hidden
        np.testing.assert_allclose(before[:, :at], after[:, :at], atol=2e-6)
        assert jnp.abs(before[:, at:] - after[:, at:]).max() > 1e-3


def test_padding_after_the_end_changes_no_pooled_state(text):
    padded = jnp.where(jnp.arange(8) > eos_position(IDS, EOS)[:, None], 0, IDS)
    assert (padded != IDS).any()
    close(text(padded).pooled, text(IDS).pooled)
    close(text(padded).text_embeds, text(IDS).text_embeds)


def test_the_end_is_the_first_eos_and_for_old_checkpoints_the_largest_id():
    ids = jnp.asarray([[62, 5, EOS, EOS], [62, 5, 7, 9]])
    np.testing.assert_array_equal(eos_position(ids, EOS), [2, 0])
    np.testing.assert_array_equal(eos_position(ids, 2), [2, 0])
    np.testing.assert_array_equal(eos_position(jnp.asarray([[62, 5, 2, EOS]]), 2), [3])


def test_scanned_equals_unrolled_recomputed_or_not(params):
    options = dict(projection=True, hidden_layer=-2)
    pairs = [
        (CLIPTextModel, TEXT, IDS),
        (CLIPVisionModel, VISION, jax.random.normal(jax.random.key(1), (2, 16, 16, 3))),
    ]
    for kind, config, inputs in pairs:
        listed = jax.jit(kind(config, **options).apply)({"params": params}, inputs)
        for remat in (False, True):
            scanned = kind(config, scan=True, remat=remat, **options)
            jax.tree.map(close, jax.jit(scanned.apply)({"params": stack(params)}, inputs), listed)


def test_recomputation_changes_no_gradient(params):
    """A network of one layer has the same gradient with recomputation as without."""
    encoder = {"layers_0": params["text_model"]["encoder"]["layers_0"]}
    tower = {"text_model": params["text_model"] | {"encoder": encoder}, "text_projection": params["text_projection"]}

    def gradient(remat):
        module = CLIPTextModel(dataclasses.replace(TEXT, num_hidden_layers=1), projection=True, remat=remat)
        loss = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, IDS).text_embeds ** 2))
        assert ("remat" in str(jax.make_jaxpr(loss)(tower))) == remat
        return jax.jit(loss)(tower)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient(True), gradient(False))


def test_a_chosen_layer_is_the_output_of_the_shorter_network(params):
    """hidden_layer -2 of three layers is the last of the same network cut to two; negative and positive agree."""
    cut = {
        **params,
        "text_model": {
            **params["text_model"],
            "encoder": {name: params["text_model"]["encoder"][name] for name in ("layers_0", "layers_1")},
        },
    }
    short = dataclasses.replace(TEXT, num_hidden_layers=2)
    wanted = run(CLIPTextModel(short, final_norm=False), cut)
    for layer in (-2, 2):
        close(run(CLIPTextModel(TEXT, hidden_layer=layer, final_norm=False), params).hidden, wanted.hidden)
    close(run(CLIPTextModel(TEXT, hidden_layer=-2), params).hidden, wanted.last_hidden)


def test_half_precision_compute_stays_near_float32(params, text):
    module = CLIPTextModel(TEXT, projection=True, dtype=jnp.bfloat16)
    out = run(module, params)
    assert out.last_hidden.dtype == jnp.bfloat16
    close(out.text_embeds, text(IDS).text_embeds, 0.05)


def test_both_towers_share_one_tree_with_the_encoders(params):
    clip = CLIPModel(config=CLIPConfig(text=TEXT, vision=VISION))
    assert set(params) == {"text_model", "text_projection", "vision_model", "visual_projection", "logit_scale"}
    assert jax.eval_shape(clip.text_features, params, IDS).shape == (2, 12)
    assert jax.eval_shape(clip.image_features, params, jnp.zeros((3, 16, 16, 3))).shape == (3, 12)


def test_images_are_normalised_from_this_librarys_range():
    np.testing.assert_allclose(normalize_images(jnp.ones((1, 1, 1, 3)))[0, 0, 0], [1.9303, 2.0749, 2.1459], atol=1e-3)


@pytest.mark.parametrize(("config", "number"), [(CLIP_L, 123_060_480), (CLIP_H, 352_984_064), (CLIP_BIGG, 693_021_440)])
def test_the_presets_have_the_published_sizes(config, number):
    shapes = jax.eval_shape(CLIPTextModel(config).init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == number


def test_configurations_survive_a_round_trip_and_a_nested_file():
    clip = CLIPConfig(text=TEXT, vision=VISION)
    assert CLIPConfig.from_dict(clip.to_dict()) == clip
    assert CLIPTextConfig.from_dict(clip.to_dict()) == TEXT
    assert CLIPVisionConfig.from_dict(VISION.to_dict() | {"_name_or_path": "x", "attention_dropout": 0.1}) == VISION


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"model_type": "t5"}, "t5"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        pytest.param({"eos_token_id": [1, 2]}, "eos_token_id", marks=pytest.mark.wrong_types),
    ],
)
def test_an_unsupported_configuration_is_one_clear_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        CLIPTextConfig.from_dict(TEXT.to_dict() | change, source="somewhere/config.json")
    assert str(error.value).startswith("somewhere/config.json")
    assert "\n" not in str(error.value)


def test_unfitting_inputs_say_what_fits(params):
    with pytest.raises(ValueError, match="9 tokens"):
        CLIPTextModel(TEXT).apply({"params": params}, jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match="resize"):
        CLIPVisionModel(VISION).apply({"params": params}, jnp.zeros((1, 24, 16, 3)))
    with pytest.raises(ValueError, match="hidden_layer=-5"):
        CLIPTextModel(TEXT, hidden_layer=-5).apply({"params": params}, IDS)
    with pytest.raises(ValueError, match="projection_dim"):
        CLIPConfig(text=TEXT, vision=CLIPVisionConfig())


def test_rules_name_every_layer_once():
    path = "text_model/encoder/layers/mlp/fc1"
    for pattern, replacement in RULES_CLIP_TEXT:
        path = re.sub(pattern, replacement, path)
    assert path == "text_model/encoder.layers.*.mlp/fc1"
