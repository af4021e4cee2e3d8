from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from lcm_jax import lora
from lcm_jax.nets import RULES_UNET, UNetConfig
from lcm_jax.weights.lora.files import is_lora, load_lora, lora_components, save_lora
from lcm_jax.weights.single_file.layouts import unet_layout

RNG = np.random.default_rng(0)
FORMATS = ["peft", "diffusers", "kohya"]


def array(*shape):
    return np.asarray(RNG.normal(size=shape), np.float32)


def random_adapters(like, targets=r"kernel$", rank=2, alpha=3.0):
    """Both halves filled."""
    adapters = {}
    for path, kernel in traverse_util.flatten_dict(like, sep="/").items():
        if path.endswith("kernel") and re.search(targets, path):
            shape = lora.shapes(kernel, rank)
            matrices = {half: jnp.asarray(array(*shape[half])) for half in ("down", "up")}
            adapters[path] = matrices | {"alpha": jnp.full(shape["alpha"], alpha, jnp.float32)}
    assert adapters
    return adapters


@pytest.fixture(scope="module")
def params():
    stack = {"attn1": {"to_q": {"kernel": array(2, 6, 5)}, "to_out_0": {"kernel": array(2, 5, 6)}}}
    return {
        "down_blocks_0": {
            "resnets_1": {"conv1": {"kernel": array(3, 3, 4, 7), "bias": array(7)}},
            "attentions_0": {"proj_in": {"kernel": array(1, 1, 4, 6)}, "transformer_blocks": stack},
        },
        "time_embedding": {"linear_1": {"kernel": array(4, 4)}},
    }


@pytest.fixture(scope="module")
def adapters(params):
    start = random_adapters(params, lora.DEFAULT_TARGETS)
    start |= random_adapters(params, "conv1/kernel$", rank=3, alpha=1.0)
    to_q = start["down_blocks_0/attentions_0/transformer_blocks/attn1/to_q/kernel"]
    to_q["alpha"] = jnp.asarray([3.0, 5.0])
    return start


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_same_change(found, expected):
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_allclose(lora.delta(found[path]), lora.delta(expected[path]), rtol=1e-5, atol=1e-5)


def test_without_a_network_the_file_says_where(tmp_path, adapters):
    dense = {k: v for k, v in adapters.items() if "transformer_blocks" not in k}
    save_lora(tmp_path / "a.safetensors", dense)
    assert_same(load_lora(tmp_path / "a.safetensors"), dense)
    save_lora(tmp_path / "t.safetensors", dense, component="transformer", format="diffusers")
    assert_same(load_lora(tmp_path / "t.safetensors"), dense)
    save_lora(tmp_path / "k.safetensors", dense, format="kohya")
    with pytest.raises(ValueError, match="like="):
        load_lora(tmp_path / "k.safetensors")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("component", ["unet", "transformer", "text_encoder"])
def test_there_and_back(tmp_path, params, adapters, format, component):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(path, adapters, RULES_UNET, format=format, component=component)
    assert_same(load_lora(path, params, RULES_UNET, component=component), adapters)
    assert_same(load_lora(tmp_path, jax.eval_shape(lambda: params), RULES_UNET, component=component), adapters)
    assert lora_components(path) == (component,)


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        ("peft", {"unet.down_blocks.0.resnets.1.conv1.lora_A.weight": (3, 4, 3, 3)}),
        (
            "diffusers",
            {"unet.down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_out.0.lora.up.weight": (6, 2)},
        ),
        (
            "kohya",
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_attn1_to_out_0.lora_down.weight": (2, 5),
                "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (6, 2, 1, 1),
                "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": (),
            },
        ),
    ],
)
def test_keys_and_shapes_are_those_of_the_format(tmp_path, adapters, format, keys):
    save_lora(tmp_path / "x.safetensors", adapters, RULES_UNET, format=format, dtype="float16")
    tensors = load_file(tmp_path / "x.safetensors")
    assert len(tensors) == 6 * (3 if format == "kohya" else 2)
    for key, shape in keys.items():
        assert tensors[key].shape == shape
        assert tensors[key].dtype == (np.float32 if key.endswith("alpha") else np.float16)


def one(name="to_q", prefix="unet.", layer=0, rank=2, down="lora_A", up="lora_B"):
    stem = f"{prefix}down_blocks.0.attentions.0.transformer_blocks.{layer}.attn1.{name}"
    return {f"{stem}.{down}.weight": array(rank, 6), f"{stem}.{up}.weight": array(5, rank)}


TO_Q = "down_blocks_0/attentions_0/transformer_blocks/attn1/to_q/kernel"


@pytest.mark.parametrize(
    ("prefix", "name", "down", "up"),
    [
        ("base_model.model.", "to_q", "lora_A", "lora_B"),
        ("base_model.model.unet.", "to_q", "lora_A.default", "lora_B.default"),
        ("unet.base_model.model.", "to_q", "lora_A", "lora_B"),
        ("", "to_q", "lora_A", "lora_B"),
        ("unet.", "to_q", "lora_linear_layer.down", "lora_linear_layer.up"),
        ("unet.", "processor.to_q_lora", "down", "up"),
    ],
)
def test_other_spellings_are_read(tmp_path, params, prefix, name, down, up):
    tensors = one(name, prefix, down=down, up=up)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = load_lora(tmp_path / "x.safetensors", params, RULES_UNET)[TO_Q]
    a, b = tensors.values()
    np.testing.assert_allclose(lora.delta(adapter)[0], (b @ a).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(lora.delta(adapter)[1], 0)


def test_layers_of_unequal_rank_are_padded_without_changing_their_product(tmp_path, params):
    first, second = one(rank=2), one(layer=1, rank=4)
    stems = [next(iter(t)).removesuffix(".lora_A.weight") for t in (first, second)]
    save_file(first | second | {f"{stems[0]}.alpha": np.array(6)}, tmp_path / "x.safetensors")  # an integer, as some do
    adapter = load_lora(tmp_path / "x.safetensors", params, RULES_UNET)[TO_Q]
    for i, (tensors, factor) in enumerate(((first, 3.0), (second, 1.0))):
        a, b = tensors.values()
        np.testing.assert_allclose(lora.delta(adapter)[i], factor * (b @ a).T, rtol=1e-5, atol=1e-5)


def test_half_precision_is_read_as_it_is(tmp_path, params):
    a, b = (x.astype(ml_dtypes.bfloat16) for x in one().values())
    save_file(dict(zip(one(), (a, b), strict=True)), tmp_path / "x.safetensors")
    adapter = load_lora(tmp_path / "x.safetensors", params)[TO_Q]
    np.testing.assert_array_equal(adapter["down"][0], a.astype(np.float32).T)
    assert adapter["up"].dtype == jnp.float32


def test_a_dense_adapter_fits_a_1x1_convolution_and_the_reverse(tmp_path, params):
    stem = "lora_unet_down_blocks_0_attentions_0"
    tensors = {
        f"{stem}_proj_in.lora_down.weight": array(2, 4),
        f"{stem}_proj_in.lora_up.weight": array(6, 2),
        f"{stem}_transformer_blocks_0_attn1_to_q.lora_down.weight": array(2, 6, 1, 1),
        f"{stem}_transformer_blocks_0_attn1_to_q.lora_up.weight": array(5, 2, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = load_lora(tmp_path / "x.safetensors", params, RULES_UNET)
    assert found["down_blocks_0/attentions_0/proj_in/kernel"]["down"].shape == (1, 1, 4, 2)
    assert found[TO_Q]["down"].shape == (2, 6, 2)
    lora.check_adapters(found, params)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_config_of_peft_gives_alpha(tmp_path, params, rslora):
    save_file(
        one("to_q", "base_model.model.") | one("to_q", "base_model.model.", layer=1),
        tmp_path / "adapter_model.safetensors",
    )
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks.1.attn1.to_q": 5}, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    alpha = load_lora(tmp_path, params, RULES_UNET)[TO_Q]["alpha"]
    np.testing.assert_allclose(alpha, np.array([8, 5]) * (2**0.5 if rslora else 1), rtol=1e-6)
    for wrong, message in (
        ({"lora_alpha": "8"}, "the alpha of 'lora_alpha' is '8', not a number of at most"),
        ({"lora_alpha": None}, "the alpha of 'lora_alpha' is None"),
        ({"lora_alpha": 10**400}, "the alpha of 'lora_alpha' is 1000"),
        ({"lora_alpha": 1e308}, r"the alpha of 'lora_alpha' is 1e\+308"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "the alpha of 'to_q' is nan"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], not an object"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\(', which is not the name of a module"),
        ({"alpha_pattern": {"(a+)+$": 1}}, ".*which is not the name of a module"),  # it would take years to match
        ({"alpha_pattern": dict.fromkeys(map(str, range(20_000)), 1)}, "alpha_pattern has 20000 entries"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not true or false"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
            load_lora(tmp_path, params)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa_niter_4' changed its base too"):
        load_lora(tmp_path, params)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^down_blocks\.0\.attentions\.0\.transformer_blocks\.1\.attn1\.to_q",
        "transformer_blocks.1.attn1.to_q$",
        "down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q",
    ],
)
def test_names_as_peft_writes_them_for_a_regex_are_names(tmp_path, params, pattern):
    tensors = one("to_q", "base_model.model.") | one("to_q", "base_model.model.", layer=1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for name, alpha in ((pattern, 5), (pattern.replace("to_q", "o_q"), 8), (f"x{pattern.removeprefix('^')}", 8)):
        config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {name: 5}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        np.testing.assert_array_equal(load_lora(tmp_path, params, RULES_UNET)[TO_Q]["alpha"], [8, alpha])


def test_an_alpha_of_a_kohya_file_has_bounds(tmp_path, params):
    tensors = {f"lora_unet_{'down_blocks_0_attentions_0_proj_in'}.alpha": np.float32(1e30)}
    tensors |= {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": np.ones((2, 4, 1, 1), np.float32)}
    tensors |= {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": np.ones((4, 2, 1, 1), np.float32)}
    save_file({name: np.asarray(tensor) for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"alpha is 1\.0000000150474662e\+30, not a number of at most 1048576"):
        load_lora(tmp_path / "x.safetensors", params)


def test_only_the_component_asked_for_is_taken(tmp_path, params):
    text = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": array(2, 3),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": array(3, 2),
    }
    save_file(one(prefix="unet.") | text, tmp_path / "x.safetensors")
    assert list(load_lora(tmp_path / "x.safetensors", params, RULES_UNET)) == [TO_Q]
    assert lora_components(tmp_path / "x.safetensors") == ("unet", "text_encoder")
    with pytest.raises(ValueError, match=r"no adapters for 'transformer', only for text_encoder, unet"):
        load_lora(tmp_path / "x.safetensors", params, RULES_UNET, component="transformer")


# Bad input


@pytest.mark.wrong_types
def test_what_does_not_fit_is_named(tmp_path, params, adapters):
    path = tmp_path / "x.safetensors"

    def refused(tensors, match):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=match) as error:
            load_lora(path, params, RULES_UNET)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(path))

    refused(one("to_v"), r": .*1 modules the network lacks \(down_blocks.*attn1\.to_v \(down \(2, 6\), up \(5, 2\)\)")
    refused(dict(list(one().items())[:1]), r"1 modules without both halves \(.*to_q")
    refused(
        {k: v[:, :1] for k, v in one(rank=4).items()},
        r"1 modules of another shape \(.*down \(4, 1\), up \(5, 1\), network's kernel \(2, 6, 5\)",
    )
    refused({"unet.mid_block.alpha": array()}, r"the network lacks \(mid_block\)")
    refused(one() | {"unet.strange": array(3)}, r"only plain LoRA.*1 other keys \(unet.strange\)")
    refused({}, "holds no LoRA tensors")
    refused(one() | one(down="lora_A.other", up="lora_B.other"), r"2 halves of a module given before")
    again = one(prefix="lora_unet_", down="lora_down", up="lora_up")
    again = {k.replace(".", "_", k.count(".") - 2): v for k, v in again.items()}
    refused(one() | again, r"1 modules given twice and differently")
    first = one()
    save_file(first | dict(zip(again, first.values(), strict=True)), path)  # given twice, but the same
    assert list(load_lora(path, params)) == [TO_Q]
    with pytest.raises(ValueError, match="format='zip': expected one of peft, diffusers, kohya"):
        save_lora(path, adapters, RULES_UNET, format="zip")
    with pytest.raises(ValueError, match="layout= is for format='kohya'"):
        save_lora(path, adapters, RULES_UNET, layout=unet_layout(UNetConfig()))
    with pytest.raises(ValueError, match="component='vae'"):
        save_lora(path, adapters, RULES_UNET, component="vae")
    with pytest.raises(ValueError, match="no adapters to write for unet"):
        save_lora(path, {}, RULES_UNET)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no LoRA file"):
        load_lora(tmp_path / "empty", params, RULES_UNET)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_a", "LoKr"),
        ("lora_mid.weight", r"LoCon in Tucker form \(lora_mid\)"),
        ("a1.weight", "GLoRA"),
        ("oft_blocks", "OFT"),
        ("on_input", r"\(IA\)\^3"),
        ("diff", "full difference of weights"),
        ("diff_b", "full difference of weights"),
        ("lora_B.bias", "LoRA with biases"),
        ("reshape_weight", "LoRA that reshapes layers"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, params, suffix, kind):
    key = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.{suffix}"
    save_file(one() | {key: array(3, 3)}, tmp_path / "x.safetensors")
    match = rf"x\.safetensors: a {kind}, and only plain LoRA .*1 such keys \({key}\)"
    with pytest.raises(ValueError, match=match) as error:
        load_lora(tmp_path / "x.safetensors", params)
    assert "\n" not in str(error.value)


def cross(width, channels=320):
    """A network of one cross-attention."""
    kernel = jax.ShapeDtypeStruct((width, channels), jnp.float32)
    path = "down_blocks_0/attentions_0/transformer_blocks_0/attn2"
    return traverse_util.unflatten_dict({f"{path}/to_k/kernel": kernel, f"{path}/to_v/kernel": kernel}, sep="/")


@pytest.mark.parametrize(
    ("key", "width", "network", "message"),
    [
        ("unet.{}", 2048, 768, r"SDXL \(text 2048 wide\), not for SD1 \(text 768 wide\): "),
        ("lora_unet_{}", 1024, 2048, r"SD2 \(text 1024 wide\), not for SDXL \(text 2048 wide\): "),
        ("unet.{}", 768, 12, r"SD1 \(text 768 wide\), not for a network \(text 12 wide\): "),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv", 1536, 768, r"SD3 \(text 1536 wide\), not for SD1 .*: "),
        ("unet.{}", 768, None, r"SD1 \(text 768 wide\), not for a network of another kind: "),
    ],
)
def test_a_lora_for_another_model_says_for_which(tmp_path, key, width, network, message):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    stem = key.format(name.replace(".", "_") if "lora_" in key else name)
    tensors = {f"{stem}.lora_down.weight": array(4, width), f"{stem}.lora_up.weight": array(320 * 3, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    like = cross(network) if network else {"conv_in": {"kernel": array(3, 3, 4, 4)}}
    module = stem.removeprefix("unet.").removeprefix("lora_unet_")
    shapes = rf"\(down \(4, {width}\), up \(960, 4\)"
    match = rf"x\.safetensors: does not fit the network: made for {message}{module} {shapes}"
    with pytest.raises(ValueError, match=match) as error:
        load_lora(tmp_path / "x.safetensors", like)
    assert "\n" not in str(error.value)


def test_broken_tensors_are_refused(tmp_path, params):
    path = tmp_path / "x.safetensors"
    a, b = one()

    def refused(change, match):
        save_file(one() | change, path)
        with pytest.raises(ValueError, match=rf"x\.safetensors: not a LoRA that can be read: {match}"):
            load_lora(path, params)

    alpha = a.replace("lora_A.weight", "alpha")
    refused({b: np.full((5, 2), np.nan, np.float32)}, rf"1 tensors with NaN or infinity \({b}\)")
    refused({alpha: np.array(np.inf, np.float32)}, r"1 tensors with NaN or infinity \(.*alpha\)")
    refused({a: np.ones((2, 6), np.int32)}, rf"1 tensors that are not floating \({a}: int32\)")
    refused({a: array(12)}, r"1 tensors of a shape that no LoRA has \(.*: \(12,\)\)")
    refused({a: array(0, 6), b: array(5, 0)}, r"2 tensors of a shape that no LoRA has")
    refused({alpha: array(2)}, r"1 tensors of a shape that no LoRA has \(.*alpha: \(2,\)\)")


def test_what_is_extracted_can_be_saved(tmp_path, params, adapters):
    found = lora.extract(params, lora.merge(params, adapters), rank=3)
    for format in FORMATS:
        save_lora(tmp_path / "x.safetensors", found.adapters, format=format)
        assert_same(load_lora(tmp_path / "x.safetensors", params), found.adapters)
    assert_same_change(found.adapters, adapters)


KOHYA = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def kohya(prefix, **more):
    """A module as LyCORIS and kohya's scripts name it, with other tensors of it."""
    stem = prefix + KOHYA
    return {f"{stem}.lora_down.weight": array(2, 6), f"{stem}.lora_up.weight": array(5, 2)} | {
        f"{stem}.{name}": np.asarray(value, np.float32) for name, value in more.items()
    }


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("text_encoders.clip_l.transformer.", "text_encoder"),
        ("text_encoders.clip_h.transformer.", "text_encoder"),
        ("text_encoders.clip_g.transformer.", "text_encoder_2"),
        ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    ],
)
def test_comfyui_names_of_text_encoders_are_read(tmp_path, params, prefix, component):
    tensors = one(prefix=prefix, down="lora_down", up="lora_up")
    save_file(tensors, tmp_path / "x.safetensors")
    assert lora_components(tmp_path / "x.safetensors") == (component,)
    found = load_lora(tmp_path / "x.safetensors", params, component=component)[TO_Q]
    np.testing.assert_array_equal(found["down"][0].T, next(iter(tensors.values())))


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_lycoris_plain_lora_is_read(tmp_path, params, prefix):
    tensors = kohya(prefix, alpha=1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    assert is_lora(tmp_path / "x.safetensors")
    found = load_lora(tmp_path / "x.safetensors", params)[TO_Q]
    np.testing.assert_array_equal(found["up"][0].T, tensors[f"{prefix}{KOHYA}.lora_up.weight"])
    assert found["alpha"][0] == 1.0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_scalar_scales_the_difference(tmp_path, params, shape):
    """LyCORIS' use_scalar: W' = W + scalar * alpha / rank * up @ down."""
    tensors = kohya("lora_unet_", alpha=1.0, scalar=-0.5)
    key = f"lora_unet_{KOHYA}.scalar"
    tensors[key] = np.reshape(tensors[key], shape)
    save_file(tensors, tmp_path / "x.safetensors")
    down, up = (tensors[f"lora_unet_{KOHYA}.lora_{half}.weight"] for half in ("down", "up"))
    found = load_lora(tmp_path / "x.safetensors", params)[TO_Q]
    np.testing.assert_allclose(lora.delta(found)[0].T, -0.5 * 1.0 / 2 * up @ down, rtol=1e-5)


@pytest.mark.parametrize(("value", "said"), [(np.float32("nan"), "NaN"), (np.zeros(3, np.float32), "shape")])
def test_a_scalar_that_is_none_is_refused(tmp_path, params, value, said):
    save_file(kohya("lora_unet_") | {f"lora_unet_{KOHYA}.scalar": np.asarray(value)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said):
        load_lora(tmp_path / "x.safetensors", params)


@pytest.mark.parametrize("more", [{}, {"alpha": 64.0}, {"scalar": -2.0}])
def test_the_scale_of_a1111_goes_before_alpha(tmp_path, params, more):
    """NetworkModule.calc_scale of A1111: scale, else alpha / rank, else 1."""
    tensors = kohya("lora_unet_", scale=0.25, **more)
    save_file(tensors, tmp_path / "x.safetensors")
    down, up = (tensors[f"lora_unet_{KOHYA}.lora_{half}.weight"] for half in ("down", "up"))
    found = load_lora(tmp_path / "x.safetensors", params)[TO_Q]
    np.testing.assert_allclose(lora.delta(found)[0].T, 0.25 * more.get("scalar", 1.0) * up @ down, rtol=1e-5)


@pytest.mark.parametrize(("value", "said"), [(np.inf, "NaN or infinity"), ([1.0, 2.0], "shape"), (1e30, "its alpha")])
def test_a_scale_that_is_none_is_refused(tmp_path, params, value, said):
    save_file(kohya("lora_unet_", scale=value), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said):
        load_lora(tmp_path / "x.safetensors", params)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin"])
def test_a_folder_of_a_pickled_lora_says_how_it_is_converted(tmp_path, params, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=rf"{name}: a pickle.*python -m lcm_jax.weights.from_pickle {tmp_path} "):
        load_lora(tmp_path, params)


@pytest.mark.parametrize("word", ["a\nb", "x" * 4000, "\x1b[31mred", ""])
def test_the_words_of_embeddings_are_shown_in_one_line(tmp_path, params, word):
    save_file(kohya("lora_unet_") | {f"bundle_emb.{word}.clip_l": array(2, 16)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="holds 1 embeddings") as caught:
        load_lora(tmp_path / "x.safetensors", params)
    assert str(caught[0].message).isprintable()
    assert len(str(caught[0].message)) < 600 + len(str(tmp_path))


def test_embeddings_in_a_lora_are_named_and_left_out(tmp_path, params):
    """A1111's bundles: the rest is the LoRA that it would be alone."""
    plain = kohya("lora_unet_", alpha=1.0)
    words = {f"bundle_emb.my cat.{name}": array(2, 16) for name in ("string_to_param.*", "clip_l")}
    save_file(plain | words | {"bundle_emb.dog.clip_g": array(2, 20)}, tmp_path / "x.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.warns(UserWarning, match=r"x.safetensors: holds 2 embeddings \(dog, my cat\).* left out"):
        found = load_lora(tmp_path / "x.safetensors", params)
    assert_same(found, load_lora(tmp_path / "plain.safetensors", params))
    assert lora_components(tmp_path / "x.safetensors") == ("unet",)
