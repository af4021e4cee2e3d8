"""Textual inversions in every form of file, and those that are for another model, damaged, or no embeddings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import lcm_jax
from lcm_jax.weights.diffusers_folder import Folder
from lcm_jax.weights.embeddings import (
    CLIP_TABLE,
    bundled_embeddings,
    read_embedding,
    save_embedding,
    with_embeddings,
)
from lcm_jax.weights.safetensors_files import save_tensors
from mmdit.text import Tokenizer, train_tokenizer

random = np.random.default_rng(0)


def vectors(n: int, width: int) -> np.ndarray:
    return random.standard_normal((n, width)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["red heart", "dog face"], 530, tmp_path_factory.mktemp("tokenizer"), 12)


@pytest.fixture(scope="module")
def sd(tiny_model: Path) -> Folder:
    return lcm_jax.load(tiny_model).folder


@pytest.fixture(scope="module")
def sd3(tiny_sd3: Path) -> Folder:
    return lcm_jax.load(tiny_sd3).folder


@pytest.fixture(scope="module")
def sdxl(tokenizer: Tokenizer) -> Any:
    """As much of a folder as the reader asks for."""

    def part(width: int) -> Any:
        return SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace(hidden_size=width)))

    names = {"text_encoder": 768, "text_encoder_2": 1280}
    components = {name: part(width) for name, width in names.items()}
    return SimpleNamespace(family="sdxl", components=components, tokenizers=dict.fromkeys(names, tokenizer))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("name", "keys", "word"),
    [
        ("x", {"<cat>": 3}, "<cat>"),
        ("my-style", {"string_to_param.*": 2}, "my-style"),
        ("my-style", {"string_to_param.*": 2, "string_to_token.*": None}, "my-style"),
        ("kohya", {"emb_params": 1}, "kohya"),
        ("one-trainer", {"emp_params": 4}, "one-trainer"),
        ("one-trainer", {"clip_l": 1}, "one-trainer"),
    ],
)
def test_forms_of_files_for_one_encoder(sd: Folder, tmp_path: Path, name: str, keys: dict[str, Any], word: str) -> None:
    tensors = {key: np.zeros(1, np.int64) if n is None else vectors(n, 16) for key, n in keys.items()}
    save_tensors(tmp_path / f"{name}.safetensors", tensors)
    embedding = read_embedding(tmp_path / f"{name}.safetensors", sd)
    key = next(iter(keys))
    assert embedding.word == word
    np.testing.assert_array_equal(embedding.vectors["text_encoder"], tensors[key])
    assert read_embedding(tmp_path / f"{name}.safetensors", sd, "<other>").word == "<other>"


@pytest.mark.wrong_types
def test_a_vector_without_an_axis_a_name_in_the_header_and_half_precision(sd: Folder, tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"<cat>": vectors(1, 16)[0].astype(np.float16)})
    assert read_embedding(tmp_path / "x.safetensors", sd).vectors["text_encoder"].shape == (1, 16)
    save_tensors(tmp_path / "y.safetensors", {"emb_params": vectors(2, 16)}, {"name": "named"})
    assert read_embedding(tmp_path / "y.safetensors", sd).word == "named"


@pytest.mark.wrong_types
def test_several_encoders(sdxl: Any, sd3: Folder, tmp_path: Path) -> None:
    tensors = {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)}
    save_tensors(tmp_path / "xl.safetensors", tensors)
    found = read_embedding(tmp_path / "xl.safetensors", sdxl)
    assert {name: array.shape for name, array in found.vectors.items()} == {
        "text_encoder": (2, 768), "text_encoder_2": (2, 1280)}  # fmt: skip
    for t5 in ("t5", "t5xxl"):
        save_tensors(
            tmp_path / "3.safetensors", {"clip_l": vectors(2, 16), "clip_g": vectors(2, 12), t5: vectors(3, 32)}
        )
        assert len(read_embedding(tmp_path / "3.safetensors", sd3).vectors["text_encoder_3"]) == 3
    save_tensors(tmp_path / "3.safetensors", {"clip_l": vectors(2, 16), "clip_g": vectors(2, 12)})
    with pytest.warns(UserWarning, match="no vectors for T5"):
        assert len(read_embedding(tmp_path / "3.safetensors", sd3).vectors) == 2


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        (
            "sd",
            {"<cat>": vectors(1, 768)},
            r"vectors of 768 numbers \(those of SD1\), and this model's text_encoder has 16",
        ),
        (
            "sd",
            {"clip_l": vectors(1, 16), "clip_g": vectors(1, 12)},
            "an embedding for SDXL, and this model is SD1 or SD2",
        ),
        ("sdxl", {"emb_params": vectors(1, 768)}, "an embedding for SD1 or SD2, and this model is SDXL"),
        ("sdxl", {"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280), "t5": vectors(1, 8)}, "an embedding for SD3"),
        ("sdxl", {"clip_l": vectors(1, 1024), "clip_g": vectors(1, 1280)}, "vectors of 1024 numbers.*has 768"),
        ("sd3", {"<cat>": vectors(1, 16)}, "an embedding for SD1 or SD2, and this model is SD3"),
        ("sd", {"<cat>": np.full((1, 16), np.nan, np.float32)}, "'<cat>' holds infinity or NaN"),
        ("sd", {"<cat>": np.ones((1, 16), np.int32)}, "is int32 of shape"),
        ("sd", {"<cat>": np.ones((1, 2, 16), np.float32)}, r"of shape \(1, 2, 16\)"),
        ("sd", {"<cat>": np.ones((0, 16), np.float32)}, r"of shape \(0, 16\)"),
        ("sd", {"a.weight": vectors(1, 16), "b.weight": vectors(1, 16)}, "not a textual inversion.*2 other keys"),
    ],
)
def test_what_does_not_fit_is_one_line(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, tensors: dict[str, Any], message: str
) -> None:
    save_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_embedding(tmp_path / "x.safetensors", request.getfixturevalue(family))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.wrong_types
def test_outputs_of_onetrainer_are_named(sd: Folder, tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"emp_params": vectors(1, 16), "emp_params_out": vectors(1, 16)})
    with pytest.warns(UserWarning, match=r"1 output embeddings \(emp_params_out\) of OneTrainer are left out"):
        assert len(read_embedding(tmp_path / "x.safetensors", sd).vectors["text_encoder"]) == 1


def test_pickles_are_refused_with_the_command(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "style.pt").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(ValueError, match=r"style.pt: a pickle, .*python -m lcm_jax.weights.from_pickle"):
        lcm_jax.load(tiny_model, embeddings=tmp_path / "style.pt")
    with pytest.raises(FileNotFoundError, match=r"embedding .*nothing.safetensors': no such file or folder$"):
        lcm_jax.load(tiny_model, embeddings=tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("word", ["heart", "two words", ""])
def test_words_that_cannot_be(sd: Folder, tmp_path: Path, word: str) -> None:
    save_tensors(tmp_path / "x.safetensors", {"emb_params": vectors(1, 16)})
    embedding = read_embedding(tmp_path / "x.safetensors", sd, word or " ")
    with pytest.raises(ValueError, match=r"x.safetensors: the word .*, such as"):
        with_embeddings(sd, [embedding])


def test_rows_of_the_table(sd: Folder, tmp_path: Path) -> None:
    """Free rows at the table's end are used, then it grows; nothing else changes."""
    component = sd.components["text_encoder"]
    size = component.module.config.vocab_size
    count = size - sd.tokenizers["text_encoder"].vocab_size + 2
    save_tensors(tmp_path / "x.safetensors", {"<a>": vectors(count, 16)})
    embedding = read_embedding(tmp_path / "x.safetensors", sd)
    grown = with_embeddings(sd, [embedding])
    assert sd.tokenizers["text_encoder"].pieces(["<a>"]) != grown.tokenizers["text_encoder"].pieces(["<a>"])
    ids = grown.tokenizers["text_encoder"].pieces(["<a>"])[0]
    assert len(ids) == count
    assert grown.components["text_encoder"].module.config.vocab_size == max(ids) + 1 == size + 2
    before = traverse_util.flatten_dict(component.params, sep="/")
    after = traverse_util.flatten_dict(grown.components["text_encoder"].params, sep="/")
    np.testing.assert_array_equal(after[CLIP_TABLE][jnp.asarray(ids)], embedding.vectors["text_encoder"])
    np.testing.assert_array_equal(after[CLIP_TABLE][: min(ids)], before[CLIP_TABLE][: min(ids)])
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items() if name != CLIP_TABLE)
    halves = grown.components["text_encoder"].map_params(lambda _, leaf: jnp.asarray(leaf, jnp.bfloat16))
    assert traverse_util.flatten_dict(halves, sep="/")[CLIP_TABLE].shape == (size + 2, 16)


def test_what_is_written_is_read(sd: Folder, sd3: Folder, tmp_path: Path) -> None:
    for folder, widths in ((sd, (16,)), (sd3, (16, 12, 32))):
        arrays = {name: vectors(2, width) for name, width in zip(folder.tokenizers, widths, strict=True)}
        save_embedding(tmp_path / "learned_embeds.safetensors", "<cat>", arrays, folder.family)
        again = read_embedding(tmp_path, folder)
        assert again.word == "<cat>"
        assert all(np.array_equal(again.vectors[name], array) for name, array in arrays.items())


def test_embeddings_of_a_lora_are_used(tiny_model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    half = {f"{module}.lora_down.weight": vectors(2, 16)[..., None, None], f"{module}.lora_up.weight": vectors(16, 2)}
    half[f"{module}.lora_up.weight"] = half[f"{module}.lora_up.weight"][..., None, None]
    learned = vectors(2, 16)
    words = {"bundle_emb.v1.5-cat.string_to_param.*": learned, "bundle_emb.plain.emb_params": vectors(1, 16)}
    save_tensors(tmp_path / "x.safetensors", half | words | {"bundle_emb.heart.emb_params": vectors(1, 16)})
    pipe = lcm_jax.load(tiny_model, lora=tmp_path / "x.safetensors")
    said = [str(warning.message) for warning in recwarn if "embedding" in str(warning.message)]
    assert len(said) == 1
    assert "'heart', which is left out: it is in the vocabulary" in said[0]
    ids = pipe.folder.tokenizers["text_encoder"].pieces(["a v1.5-cat", "plain"])
    assert len(ids[0]) == 1 + 2
    table = traverse_util.flatten_dict(pipe.params["text_encoder"], sep="/")[CLIP_TABLE]
    np.testing.assert_array_equal(table[jnp.asarray(ids[0][1:])], learned)
    assert [e.word for e in bundled_embeddings(tmp_path / "x.safetensors", lcm_jax.load(tiny_model).folder)] == [
        "plain", "v1.5-cat"]  # fmt: skip


@pytest.mark.wrong_types
@pytest.mark.parametrize("given", [5, [5], [("a", "b", "c")], ("a.safetensors", 3)])
def test_what_is_no_file_is_refused(tiny_model: Path, given: Any) -> None:
    with pytest.raises(ValueError, match=r"embeddings is .*: give a file, a pair \(file, word\), or a list"):
        lcm_jax.load(tiny_model, embeddings=given)
