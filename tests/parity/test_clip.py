"""CLIP against transformers, there and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import save_file  # noqa: E402

from lcm_jax.objectives.contrastive import contrastive_loss  # noqa: E402
from lcm_jax.weights.torch_params import from_torch, to_torch  # noqa: E402
from mmdit.rules import OPTIONAL_CLIP, RULES_CLIP_TEXT, RULES_CLIP_VISION  # noqa: E402
from mmdit.text.clip import CLIPModel, CLIPTextModel, CLIPVisionModel  # noqa: E402
from mmdit.text.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig  # noqa: E402

torch.set_num_threads(1)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=24)
TEXT = dict(SMALL, vocab_size=96, max_position_embeddings=12, bos_token_id=94, eos_token_id=95, pad_token_id=95)
VISION = dict(SMALL, image_size=24, patch_size=8)
IDS = np.asarray([[94, 5, 9, 11, 95, 95, 95, 95, 95, 95], [94, 30, 95, 0, 0, 0, 0, 0, 0, 0], [94] + [7] * 8 + [95]])
IMAGES = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)


def randomised(model, seed=0):
    """Random weights everywhere, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def close(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.numpy()
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= 1e-4, error


def load(module, inputs, tensors, rules):
    like = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return from_torch(tensors, like, rules, optional=OPTIONAL_CLIP)


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 95), ("gelu", 2)])
@torch.no_grad()
def test_text_with_projection(act, eos):
    values = dict(TEXT, hidden_act=act, eos_token_id=eos)
    model = randomised(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**values)))
    theirs = model(torch.tensor(IDS), output_hidden_states=True)
    config = CLIPTextConfig.from_dict(model.config.to_dict())
    module = CLIPTextModel(config, projection=True, hidden_layer=-2, final_norm=False)
    params = load(module, IDS, arrays(model), RULES_CLIP_TEXT)
    ours = jax.jit(module.apply)({"params": params}, jnp.asarray(IDS))
    close(ours.last_hidden, theirs.last_hidden_state)
    close(ours.hidden, theirs.hidden_states[-2])
    close(ours.text_embeds, theirs.text_embeds)
    for layer in (0, -1) if act == "gelu" else ():
        hidden = jax.jit(module.clone(hidden_layer=layer).apply)({"params": params}, IDS).hidden
        close(hidden, theirs.hidden_states[layer])


@torch.no_grad()
def test_text_alone_saved_from_here_loads_there(tmp_path):
    """Files in the wild say `text_model.`; transformers 5 takes the prefix off for this class when it reads them."""
    module = CLIPTextModel(CLIPTextConfig(**TEXT))
    like = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    random = np.random.default_rng(0)

    def fill(path, x):
        return jnp.asarray(0.2 * random.standard_normal(x.shape) + (path[-1].key == "scale"), x.dtype)

    params = jax.tree_util.tree_map_with_path(fill, like)
    tensors = to_torch(params, RULES_CLIP_TEXT)
    assert "text_model.encoder.layers.2.self_attn.out_proj.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers.CLIPTextConfig(**module.config.to_dict()).save_pretrained(tmp_path)
    model, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs = model.eval()(torch.tensor(IDS))
    ours = jax.jit(module.apply)({"params": params}, IDS)
    close(ours.last_hidden, theirs.last_hidden_state)
    close(ours.pooled, theirs.pooler_output)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_vision_with_projection(act):
    values = dict(VISION, hidden_act=act)
    model = randomised(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**values)))
    theirs = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2)), output_hidden_states=True)
    module = CLIPVisionModel(CLIPVisionConfig.from_dict(model.config.to_dict()), hidden_layer=-2)
    params = load(module, IMAGES, arrays(model), RULES_CLIP_VISION)
    ours = jax.jit(module.apply)({"params": params}, IMAGES)
    close(ours.last_hidden, theirs.last_hidden_state)
    close(ours.hidden, theirs.hidden_states[-2])
    close(ours.image_embeds, theirs.image_embeds)


@torch.no_grad()
def test_both_towers_and_the_loss_there_and_back():
    model = randomised(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
    )
    clip = CLIPModel(config=CLIPConfig.from_dict(model.config.to_dict()))
    tensors = arrays(model)
    params = from_torch(tensors, jax.eval_shape(clip.init, jax.random.key(0)), RULES_CLIP_TEXT, optional=OPTIONAL_CLIP)
    theirs = model(torch.tensor(IDS[:2]), torch.tensor(IMAGES.transpose(0, 3, 1, 2)), return_loss=True)

    @jax.jit
    def forward(p):
        return contrastive_loss(
            clip.image_features(p, jnp.asarray(IMAGES)), clip.text_features(p, jnp.asarray(IDS[:2])), p["logit_scale"]
        )

    loss, metrics = forward(params)
    close(loss, theirs.loss)
    close(metrics["temperature"], model.logit_scale.exp())
    back = to_torch(params, RULES_CLIP_TEXT)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
