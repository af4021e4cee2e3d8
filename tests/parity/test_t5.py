"""The T5 encoder against transformers, there and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

from lcm_jax.runtime.atomic_files import write_json  # noqa: E402
from lcm_jax.weights.diffusers_folder import load_component, save_component  # noqa: E402
from lcm_jax.weights.safetensors_files import load_tensors, save_tensors  # noqa: E402
from lcm_jax.weights.torch_params import torch_shapes  # noqa: E402
from mmdit.rules import RULES_T5  # noqa: E402
from mmdit.text.t5 import T5Encoder, relative_buckets  # noqa: E402
from mmdit.text.t5_config import T5_XXL, T5Config  # noqa: E402

torch.set_num_threads(1)
SMALL = dict(
    vocab_size=64,
    d_model=24,
    d_kv=6,
    d_ff=40,
    num_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=9,
)
IDS = np.asarray([[5, 9, 11, 40, 33, 2, 8, 21, 60, 3, 3, 17, 1, 0], [30, 7, 1] + [0] * 11])
SECOND = "encoder.embed_tokens.weight"


def randomised(model, seed=0):
    """Random weights everywhere, norms included, large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def error(ours, theirs):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module", params=["gated-gelu", "relu"])
def saved(request, tmp_path_factory):
    """A random model of transformers, and the folder that it saves itself to."""
    torch.manual_seed(0)
    model = randomised(transformers.T5EncoderModel(transformers.T5Config(**SMALL, feed_forward_proj=request.param)))
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder / "text_encoder_3")
    return model, folder


@pytest.mark.parametrize(("length", "buckets", "distance"), [(600, 32, 128), (40, 8, 9), (90, 18, 50)])
def test_buckets(length, buckets, distance):
    offset = torch.arange(length)[None] - torch.arange(length)[:, None]
    theirs = T5Attention._relative_position_bucket(offset, True, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(length, buckets, distance), theirs.numpy())


@torch.no_grad()
def test_states_with_and_without_a_mask(saved):
    model, folder = saved
    module, params = load_component(folder, "text_encoder_3")
    mask = IDS != 0
    theirs = model(torch.tensor(IDS)).last_hidden_state
    masked = model(torch.tensor(IDS), torch.tensor(mask)).last_hidden_state
    apply = jax.jit(module.apply)
    assert error(apply({"params": params}, IDS), theirs) <= 1e-4
    assert error(apply({"params": params}, IDS, mask), masked) <= 1e-4
    assert error(apply({"params": params}, IDS), masked) > 1e-2


@torch.no_grad()
def test_half_precision_is_as_near_as_theirs(saved):
    """Both against float32: float16 with the sums of `wo` kept wide, there by keeping its weight wide too."""
    model, folder = saved
    exact = model(torch.tensor(IDS)).last_hidden_state
    half = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=torch.float16).eval()
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    theirs = error(half(torch.tensor(IDS)).last_hidden_state.float().numpy(), exact)
    module, params = load_component(folder, "text_encoder_3", dtype=jnp.float16)
    ours = error(jax.jit(module.apply)({"params": params}, IDS), exact)
    assert ours <= max(2 * theirs, 0.02), (ours, theirs)


@torch.no_grad()
def test_there_and_back_and_loaded_there_again(saved, tmp_path):
    model, folder = saved
    component = load_component(folder, "text_encoder_3")
    assert save_component(tmp_path, "text_encoder_3", component) == ("transformers", "T5EncoderModel")
    want = {name: value.numpy() for name, value in model.state_dict().items() if name != SECOND}
    back = load_tensors(tmp_path / "text_encoder_3", stem="model")
    assert back.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(back[name], value)
    again, report = transformers.T5EncoderModel.from_pretrained(tmp_path / "text_encoder_3", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for key, value in component.module.config.to_dict().items():
        assert getattr(again.config, key) == value
    np.testing.assert_array_equal(
        again.eval()(torch.tensor(IDS)).last_hidden_state.numpy(), model(torch.tensor(IDS)).last_hidden_state.numpy()
    )
    rest = load_component(tmp_path, "text_encoder_3")
    jax.tree.map(np.testing.assert_array_equal, rest.params, component.params)


def test_the_embedding_under_either_name_or_both_and_a_whole_t5(saved, tmp_path):
    _, folder = saved
    module, params = load_component(folder, "text_encoder_3")
    config = module.config
    tensors = dict(load_tensors(folder / "text_encoder_3", stem="model"))
    shared = tensors.pop("shared.weight")
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": shared, "lm_head.weight": shared}
    forms = {
        "first": {"shared.weight": shared},
        "second": {SECOND: shared},
        "both": {"shared.weight": shared, SECOND: shared},
        "whole": {"shared.weight": shared, "decoder.embed_tokens.weight": shared, SECOND: shared, **decoder},
    }
    for name, embedding in forms.items():
        save_tensors(tmp_path / name / "model.safetensors", {**tensors, **embedding})
        write_json(tmp_path / name / "config.json", {**config.to_dict(), "architectures": ["T5EncoderModel"]})
        jax.tree.map(np.testing.assert_array_equal, load_component(tmp_path, name).params, params)
    save_tensors(tmp_path / "none" / "model.safetensors", tensors)
    write_json(tmp_path / "none" / "config.json", {**config.to_dict(), "architectures": ["T5EncoderModel"]})
    with pytest.raises(ValueError, match=r"1 missing \(shared\.weight\)"):
        load_component(tmp_path, "none")


def test_xxl_has_the_same_keys_and_shapes():
    values = {key: value for key, value in T5_XXL.to_dict().items() if key != "model_type"}
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(**values)).state_dict()
    like = jax.eval_shape(T5Encoder(T5_XXL, scan=True).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    want = {name: tuple(value.shape) for name, value in theirs.items() if name != SECOND}
    assert torch_shapes(like, RULES_T5) == want
    listed = jax.eval_shape(T5Encoder(T5_XXL).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert torch_shapes(listed["params"], RULES_T5) == want


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_transformers_own_config_is_read(kind):
    theirs = transformers.T5Config(**SMALL, feed_forward_proj=kind)
    assert T5Config.from_dict(theirs.to_dict()) == T5Config(**SMALL, feed_forward_proj=kind)
    assert T5Config.from_dict({}) == T5Config.from_dict(transformers.T5Config().to_dict())
