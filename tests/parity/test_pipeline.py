"""End to end: tiny pipelines of diffusers, loaded here, draw the same pictures from the same noise.

Every family of Stable Diffusion's UNets, text-to-image and image-to-image, with diffusers' scheduler of each sampler
made by `Scheduler.from_config(pipe.scheduler.config)`. Pictures are compared as bytes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax.weights.safetensors_files import save_tensors
from mmdit.text import train_tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CAPTIONS = ["red heart", "yellow heart", "woman farmer, medium skin tone", "flag of france", "dog face", "cat face"]
PROMPTS = ["red heart", "woman farmer, medium skin tone"]
SHAPE = (2, 8, 8, 4)
LENGTH = 12  # tokens of a prompt
NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
SCHEDULERS = {
    "lcm": diffusers.LCMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}
# What the published scheduler_config.json have in common, among it keys of other classes.
COMMON = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

# One level each, most without a middle: what networks are made of is compared in test_unet and test_autoencoder.
SD15 = {"cross_attention_dim": 16, "attention_head_dim": 2, "mid_block_type": "UNetMidBlock2DCrossAttn"}
SD21 = {"cross_attention_dim": 24, "attention_head_dim": (2,), "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 16 + 24,
    "attention_head_dim": (2,),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
REFINER = SDXL | {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 8 + 20}


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def stirred(module: Any) -> Any:
    """Random parameters that keep the variance of what flows through, so that every input shows in the picture."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.eval()


def unet(config: dict[str, Any], **more: Any) -> Any:
    sizes = {"sample_size": 8, "block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return stirred(diffusers.UNet2DConditionModel(**{"mid_block_type": None, **sizes, **kinds, **config, **more}))


def vae(scaling_factor: float) -> Any:
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 8, "mid_block_add_attention": False}
    return stirred(diffusers.AutoencoderKL(latent_channels=4, scaling_factor=scaling_factor, **sizes))


def text(tokenizer: Any, width: int, *, projection: bool = False, act: str = "quick_gelu", **more: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        projection_dim=20,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"eos_token_id": tokenizer.eos_token_id, **more},
    )
    return stirred((transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config))


def scheduler(name: str, **more: Any) -> Any:
    """As loaded from a published config: keys that the class does not know are kept for others."""
    made = getattr(diffusers, name).from_config(COMMON | more)
    made.register_to_config(**COMMON, **more)
    return made


@dataclass(frozen=True, kw_only=True)
class Family:
    ours: lcm_jax.Pipeline
    draw: Any  # diffusers' pipelines with the same networks
    redraw: Any
    config: dict[str, Any]  # the folder's scheduler config as diffusers loaded it
    index: dict[str, Any]  # and its model_index.json


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Padding with the end of text (SD1, SDXL's first), and with "!" (SD2, SDXL's second)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    first = train_tokenizer(CAPTIONS, 600, folder, LENGTH).backend
    return first, transformers.CLIPTokenizer.from_pretrained(folder, pad_token="!")


@pytest.fixture(scope="module")
def families(tokenizers: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """A family's pipelines, made when first asked for."""
    first, second = tokenizers
    made: dict[str, Family] = {}

    def sd(kind: Any, tokenizer: Any, encoder: Any, net: Any, noise: Any) -> Any:
        parts = {"tokenizer": tokenizer, "text_encoder": encoder, "unet": net, "scheduler": noise, "vae": vae(0.18215)}
        return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)

    def sdxl(kind: Any, encoder: Any, net: Any, **settings: Any) -> Any:
        parts = {"unet": net, "scheduler": scheduler("EulerDiscreteScheduler", timestep_spacing="leading")}
        big = text(second, 24, projection=True, act="gelu", eos_token_id=2)  # as published: the largest id
        return kind(
            **parts, vae=vae(0.13025), text_encoder=encoder, tokenizer=None if encoder is None else first,
            text_encoder_2=big, tokenizer_2=second, add_watermarker=False, **settings,
        )  # fmt: skip

    def build(name: str) -> Any:
        torch.manual_seed(0)
        plain, consistent = diffusers.StableDiffusionPipeline, diffusers.LatentConsistencyModelPipeline
        large, refining = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLImg2ImgPipeline
        if name in ("sd15", "lcm_lora"):
            return sd(plain, first, text(first, 16), unet(SD15), scheduler("PNDMScheduler"))
        if name == "sd21":
            noise = scheduler("DDIMScheduler", prediction_type="v_prediction")
            return sd(plain, second, text(second, 24, act="gelu"), unet(SD21), noise)
        if name == "turbo":
            noise = scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
            return sd(plain, second, text(second, 24, act="gelu"), unet(SD21), noise)
        if name == "lcm":
            noise = scheduler("LCMScheduler", original_inference_steps=50)
            return sd(consistent, first, text(first, 16), unet(SD15, time_cond_proj_dim=8), noise)
        if name.startswith("sdxl"):
            distilled = {"time_cond_proj_dim": 8} if name == "sdxl_lcm" else {}
            return sdxl(large, text(first, 16), unet(SDXL, **distilled), force_zeros_for_empty_prompt=True)
        settings = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        return sdxl(refining, None, unet(REFINER), **settings)

    def make(name: str) -> Family:
        folder = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(folder)
        oracle = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        oracle.set_progress_bar_config(disable=True)
        lora = add_lora(oracle, tmp_path_factory.mktemp("lora")) if name == "lcm_lora" else None
        redraw = oracle if name == "refiner" else diffusers.AutoPipelineForImage2Image.from_pipe(oracle)
        redraw.set_progress_bar_config(disable=True)
        ours = lcm_jax.load(folder, lora=lora)
        config, index = dict(oracle.scheduler.config), dict(oracle.config)
        return Family(ours=ours, draw=oracle, redraw=redraw, config=config, index=index)

    def get(name: str) -> Family:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def add_lora(oracle: Any, folder: Path) -> Path:
    """Random adapters on the oracle's UNet, saved as diffusers saves them."""
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "proj_in", "conv1", "ff.net.0.proj"])
    oracle.unet.add_adapter(config)
    for name, weight in oracle.unet.named_parameters():
        if "lora_" in name:
            weight.normal_(std=0.2)
    type(oracle).save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(oracle.unet))
    return folder


def to_torch(array: Any) -> Any:
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def oracle_picture(
    family: Family, monkeypatch: pytest.MonkeyPatch, *, sampler: str, image: bool, options: dict[str, Any]
) -> np.ndarray:
    """diffusers' pictures as bytes, drawn with our random numbers.

    Its image-to-image starts from a draw of the autoencoder's posterior where ours starts from the mean, and draws the
    first noise itself: both functions are replaced. The schedulers' noise is replaced by what the seed gives here.
    """
    pipe = family.redraw if image else family.draw
    pipe.scheduler = SCHEDULERS[sampler].from_config(family.config)
    key = jax.random.split(jax.random.key(0))[1]
    drawn = (to_torch(jax.random.normal(jax.random.fold_in(key, i), SHAPE)) for i in itertools.count())
    module = sys.modules[type(pipe.scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    start: dict[str, Any] = {"latents": to_torch(NOISE)}
    if image:
        module = sys.modules[type(pipe).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: to_torch(NOISE))
        monkeypatch.setattr(module, "retrieve_latents", lambda output, **_: output.latent_dist.mean)
        start = {"image": to_torch(IMAGES.astype(np.float32) / 255), "strength": 0.6}
    return np.round(pipe(PROMPTS, **start | options, output_type="np").images * 255)


SDXL_NAMES = {"original_size": "original_size", "crop": "crops_coords_top_left", "aesthetic_score": "aesthetic_score"}


def compare(
    family: Family, monkeypatch: pytest.MonkeyPatch, *, sampler: str, guidance: float, negative: str, image: bool,
    steps: int = 4, **sizes: Any,
) -> None:  # fmt: skip
    options = sizes | ({"image": IMAGES, "strength": 0.6} if image else {})
    ours = family.ours(
        PROMPTS, negative_prompt=negative, steps=steps, guidance=guidance, sampler=sampler, latents=NOISE, **options
    )
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    options |= {SDXL_NAMES[name]: value for name, value in sizes.items()}
    if negative:
        options["negative_prompt"] = [negative] * len(PROMPTS)
    assert_same(ours, oracle_picture(family, monkeypatch, sampler=sampler, image=image, options=options))


def assert_same(ours: np.ndarray, want: np.ndarray) -> None:
    difference = np.abs(ours - want)
    assert want.std() > 20, "a grey picture says nothing"
    assert difference.mean() <= 0.1, difference.mean()
    assert difference.max() <= 1, difference.max()


MASK = np.zeros((8, 8), np.uint8)
MASK[2:6, 3:] = 255


@pytest.mark.parametrize(
    ("name", "sampler", "strength"),
    [("sd15", "ddim", 0.6), ("sd15", "ddim", 1.0), pytest.param("sdxl", "euler", 1.0, marks=pytest.mark.slow)],
)
def test_inpainting(
    families: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch, name: str, sampler: str, strength: float
) -> None:
    family = families(name)
    kinds = {"sd15": diffusers.StableDiffusionInpaintPipeline, "sdxl": diffusers.StableDiffusionXLInpaintPipeline}
    redraw = kinds[name].from_pipe(family.draw)
    redraw.set_progress_bar_config(disable=True)
    options = {"guidance": 4.0, "sampler": sampler, "latents": NOISE, "steps": 4}
    ours = family.ours(PROMPTS, image=IMAGES, mask=MASK, strength=strength, **options)
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "strength": strength, "height": 8, "width": 8}
    options["mask_image"] = torch.from_numpy(MASK / np.float32(255))[None, None]
    want = oracle_picture(replace(family, redraw=redraw), monkeypatch, sampler=sampler, image=True, options=options)
    assert_same(ours, want)


SIZES = {"original_size": (40, 24), "crop": (3, 5)}
DIAGONAL = [
    ("sd15", "ddim", 4.0, "dog face", False, {}),
    ("sd15", "ddim", 4.0, "", True, {}),
    ("sd21", "dpm++2m", 4.0, "", False, {}),
    ("sdxl", "euler", 4.0, "", False, {}),  # no negative prompt: zeros
    ("sdxl", "euler", 4.0, "dog face", False, SIZES),
    ("refiner", "dpm++2m", 4.0, "dog face", True, SIZES | {"aesthetic_score": 8.0}),
    ("lcm", "lcm", 3.0, "", False, {}),
    ("lcm_lora", "lcm", 1.0, "", False, {}),
]
GUIDANCE = [(1.0, ""), (4.0, ""), (4.0, "dog face")]
NAMES = ("sd15", "sd21", "sdxl", "refiner", "turbo", "lcm_lora")
PRODUCT = [
    (name, sampler, guidance, negative, image, {})
    for name, sampler, (guidance, negative), image in itertools.product(NAMES, SCHEDULERS, GUIDANCE, (False, True))
    if image or name != "refiner"
]
PRODUCT += [("sdxl_lcm", "lcm", guidance, "", image, {}) for guidance in (1.0, 4.0) for image in (False, True)]
PRODUCT += [("lcm", "lcm", 5.0, "", True, {})]


@pytest.mark.parametrize(
    ("name", "sampler", "guidance", "negative", "image", "sizes"),
    [*DIAGONAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in PRODUCT if case not in DIAGONAL)],
)
def test_same_picture(
    families: Callable[[str], Family],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    sampler: str,
    guidance: float,
    negative: str,
    image: bool,
    sizes: dict[str, Any],
) -> None:
    wanted = {"sampler": sampler, "guidance": guidance, "negative": negative, "image": image}
    compare(families(name), monkeypatch, **wanted, **sizes)


CLASSES = {
    "pndm": "PNDM",
    "unipc": "UniPCMultistep",
    "deis": "DEISMultistep",
    "lms": "LMSDiscrete",
    "heun": "HeunDiscrete",
    "dpm2": "KDPM2Discrete",
    "dpm++2s": "DPMSolverSinglestep",
    "dpm++2m": "DPMSolverMultistep",
}
RULES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
PLACED = [
    (name, sampler, rule)
    for name, sampler, rule in itertools.product(("sd15", "sd21", "sdxl"), CLASSES, (None, *RULES))
    if sampler != "pndm" or rule is None
]
QUICK = [("sd15", "pndm", None), ("sdxl", "dpm++2m", "karras")]


@pytest.mark.parametrize(
    ("name", "sampler", "rule"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in PLACED if case not in QUICK)],
)
def test_every_sampler_and_sigma_rule(
    families: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch, name: str, sampler: str, rule: str | None
) -> None:
    family = families(name)
    monkeypatch.setitem(SCHEDULERS, sampler, getattr(diffusers, f"{CLASSES[sampler]}Scheduler"))
    ruled = replace(family, config=family.config | ({RULES[rule]: True} if rule else {}))
    ours = family.ours(PROMPTS, steps=6, guidance=4.0, sampler=sampler, sigmas=rule, latents=NOISE)
    options = {"num_inference_steps": 6, "guidance_scale": 4.0}
    assert_same(ours, oracle_picture(ruled, monkeypatch, sampler=sampler, image=False, options=options))


@pytest.mark.parametrize(
    ("name", "sampler"), [("lcm_lora", "lcm"), pytest.param("turbo", "euler_a", marks=pytest.mark.slow)]
)
def test_few_steps(families: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch, name: str, sampler: str) -> None:
    wanted = {"sampler": sampler, "guidance": 1.0, "negative": "", "image": False}
    for steps in (1, 2):
        compare(families(name), monkeypatch, **wanted, steps=steps)


@pytest.mark.parametrize(
    ("name", "base", "changes"),
    [
        (
            "sdxl",
            {"sampler": "euler", "guidance": 4.0, "prompt": PROMPTS},
            [
                {"prompt": ["dog face", "cat face"]},
                {"negative_prompt": ["", ""]},
                {"negative_prompt": "dog face"},
                {"original_size": (40, 24)},
                {"crop": (3, 5)},
            ],
        ),
        (
            "refiner",
            {"sampler": "dpm++2m", "guidance": 4.0, "prompt": PROMPTS, "image": IMAGES},
            [{"negative_prompt": "dog face"}, {"aesthetic_score": 8.0}, {"strength": 0.9}],
        ),
        ("lcm", {"sampler": "lcm", "guidance": 3.0, "prompt": PROMPTS}, [{"guidance": 5.0}]),
    ],
)
def test_what_the_pipeline_is_told_shows(
    families: Callable[[str], Family], name: str, base: dict[str, Any], changes: list[dict[str, Any]]
) -> None:
    """The comparisons above could not fail if it did not."""
    plain = families(name).ours(**base, latents=NOISE).astype(int)
    for change in changes:
        assert np.abs(families(name).ours(**(base | change), latents=NOISE) - plain).mean() > 1.5, change


@pytest.mark.parametrize(
    "name", ["sd15", "sd21", "sdxl", "refiner", "lcm", pytest.param("turbo", marks=pytest.mark.slow)]
)
def test_saved_here_it_is_the_same_pipeline_in_diffusers(
    families: Callable[[str], Family], tmp_path: Path, name: str
) -> None:
    family = families(name)
    family.ours.save(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(again) is type(family.draw)
    assert {**again.config, "_name_or_path": family.index["_name_or_path"]} == family.index
    for part, module in family.draw.components.items():
        if isinstance(module, torch.nn.Module):
            loaded, info = type(module).from_pretrained(tmp_path / "saved" / part, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            want = module.state_dict()
            assert loaded.state_dict().keys() == want.keys()
            assert all(torch.equal(value, want[key]) for key, value in again.components[part].state_dict().items())
        elif part.startswith("tokenizer") and module is not None:
            assert again.components[part](PROMPTS, padding="max_length") == module(PROMPTS, padding="max_length")
    known = {key: value for key, value in again.scheduler.config.items() if not key.startswith("_")}
    assert known == {key: value for key, value in family.config.items() if not key.startswith("_")}


def test_prompt_embeddings(families: Callable[[str], Family]) -> None:
    for name in ("sd15", "sd21", "sdxl", "refiner"):
        family = families(name)
        pairs = [family.ours.encode_prompt(PROMPTS)["context"]]
        if name in ("sd15", "sd21"):
            wanted = family.draw.encode_prompt(PROMPTS, "cpu", 1, False)[:1]
        else:
            wanted = family.draw.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[::2]
            pairs.append(family.ours.encode_prompt(PROMPTS)["pooled"])
        for ours, want in zip(pairs, wanted, strict=True):
            assert np.abs(np.asarray(ours) - want.numpy()).max() <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    ("name", "sampler", "negative"),
    [
        ("sd15", "ddim", "dog face"),
        pytest.param("sdxl", "euler", "dog face", marks=pytest.mark.slow),
        pytest.param("sd21", "ddim", "", marks=pytest.mark.slow),
    ],
)
def test_clip_skip(
    families: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch, name: str, sampler: str, negative: str
) -> None:
    """Of the prompt alone, as in diffusers."""
    family = families(name)
    encoder = family.draw.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 asks for what transformers 5 no longer has
        monkeypatch.setitem(encoder.__dict__, "text_model", encoder)
    options: dict[str, Any] = {"negative_prompt": negative, "sampler": sampler, "latents": NOISE, "steps": 4}
    ours = family.ours(PROMPTS, guidance=4.0, clip_skip=1, **options)
    assert np.abs(ours - family.ours(PROMPTS, guidance=4.0, **options).astype(int)).mean() > 1.0
    theirs: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "clip_skip": 1}
    theirs |= {"negative_prompt": [negative] * len(PROMPTS)} if negative else {}
    assert_same(ours, oracle_picture(family, monkeypatch, sampler=sampler, image=False, options=theirs))


INVERTED = ["a <new> heart", "woman farmer (<new>), medium skin tone, red heart"]  # the second is too long


@pytest.mark.filterwarnings("ignore:text_encoder")
@pytest.mark.parametrize(("name", "sampler"), [pytest.param("sd15", "ddim", marks=pytest.mark.slow), ("sdxl", "euler")])
def test_textual_inversion(
    families: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, sampler: str
) -> None:
    """A word of three vectors: the same tokens, and the same picture as of diffusers with the same file."""
    family = families(name)
    folder, random = family.index["_name_or_path"], np.random.default_rng(2)
    widths = {"": 16} if name == "sd15" else {"clip_l": 16, "clip_g": 24}
    vectors = {key: random.standard_normal((3, width)).astype(np.float32) for key, width in widths.items()}
    file = tmp_path / "learned_embeds.safetensors"
    save_tensors(file, {key or "<new>": array for key, array in vectors.items()})
    ours = lcm_jax.load(folder, embeddings=file if name == "sd15" else (file, "<new>"))
    oracle = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    oracle.set_progress_bar_config(disable=True)
    if name == "sd15":
        oracle.load_textual_inversion(str(file))
    else:
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            part, tokenizer = getattr(oracle, f"text_encoder{suffix}"), getattr(oracle, f"tokenizer{suffix}")
            oracle.load_textual_inversion(
                torch.from_numpy(vectors[key]), token="<new>", text_encoder=part, tokenizer=tokenizer
            )
            # It would pool at the largest id, which is a new word's.
            getattr(part, "text_model", part).eos_token_id = tokenizer.eos_token_id
    for encoder, tokenizer in ours.folder.tokenizers.items():
        theirs = getattr(oracle, encoder.replace("text_encoder", "tokenizer"))
        texts = oracle.maybe_convert_prompt(INVERTED, theirs)
        want = theirs(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
        assert tokenizer(INVERTED, LENGTH).tolist() == want
    options: dict[str, Any] = {"sampler": sampler, "latents": NOISE, "steps": 4, "guidance": 4.0}
    drawn = ours(INVERTED, **options)
    assert np.abs(drawn - family.ours(INVERTED, **options).astype(int)).mean() > 1.0
    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", INVERTED)
    theirs = {"num_inference_steps": 4, "guidance_scale": 4.0}
    pair = replace(family, draw=oracle)
    assert_same(drawn, oracle_picture(pair, monkeypatch, sampler=sampler, image=False, options=theirs))
    if name == "sd15":  # and what is saved has the word
        ours.save(tmp_path / "saved")
        again = lcm_jax.load(tmp_path / "saved")
        np.testing.assert_array_equal(again(INVERTED, **options), drawn)


def test_prompt_embeds_are_the_prompt(families: Callable[[str], Family]) -> None:
    for name in ("sd15", "sdxl"):
        ours, options = families(name).ours, {"steps": 2, "guidance": 3.0, "latents": NOISE}
        given = {"prompt_embeds": ours.encode_prompt(PROMPTS)}
        negative = {"negative_prompt_embeds": ours.encode_prompt(["dog face"] * 2)}
        want = ours(PROMPTS, negative_prompt="dog face", **options)
        np.testing.assert_array_equal(ours(**given, **negative, **options), want)
        np.testing.assert_array_equal(ours(**given, negative_prompt="dog face", **options), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "refiner"])
def test_a_syntax_without_weights_draws_the_same(families: Callable[[str], Family], name: str) -> None:
    """Sizes, zeros for the empty prompt, and the pooled vector go the same way."""
    ours = families(name).ours
    options: dict[str, Any] = {"steps": 4, "guidance": 3.0, "latents": NOISE, "sampler": "euler"}
    options |= {"image": IMAGES} if name == "refiner" else {}
    for negative in ("", "dog face"):
        want = ours(PROMPTS, negative_prompt=negative, **options)
        got = ours(PROMPTS, negative_prompt=negative, prompt_syntax="a1111", **options)
        assert np.abs(got - want.astype(int)).max() <= 1
    beside = ours([PROMPTS[0], "red heart BREAK dog face"], prompt_syntax="a1111", negative_prompt=negative, **options)
    assert np.abs(beside[0] - got[0].astype(int)).max() <= 1, "a longer prompt beside it changes nothing"
    switched = ours(["[red heart:dog:1]", PROMPTS[1]], prompt_syntax="a1111", **options)
    plain = ours(PROMPTS, **options)
    assert np.abs(switched[1] - plain[1].astype(int)).max() <= 1
    assert np.any(switched[0] != plain[0])
