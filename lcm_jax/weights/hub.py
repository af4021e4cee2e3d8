"""Locations of models: a bundled name, a file or folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from lcm_jax.runtime.messages import did_you_mean, shown
from lcm_jax.weights.component import Component, read_part, to_component
from lcm_jax.weights.safetensors_files import pickles_of_hub


@dataclass(frozen=True, kw_only=True)
class Location:
    """A model's folder or file, and the sub-folders with other names than usual (unet, vae, ..., model_index.json).

    >>> from lcm_jax.weights.hub import locate
    >>> teacher = locate("openmoji-teacher")
    >>> teacher.subpath("unet"), teacher.subpath("vae"), teacher.at("model_index.json").name
    ('unet_teacher', 'vae', 'model_index_teacher.json')
    """

    path: Path
    subfolders: Mapping[str, str] = field(default_factory=dict)  # component -> sub-folder, relative to `path`

    def subpath(self, component: str) -> str:
        """Return the path of a component's folder, or of the file model_index.json, relative to `path`."""
        return self.subfolders.get(component, component)

    def at(self, component: str) -> Path:
        """Return the path of a component's folder, or of the file model_index.json."""
        return self.path / self.subpath(component)

    def load(self, component: str, **options: Any) -> Component:
        """Read one component's network; `options` are those of `component.to_component` (dtype, scan, shardings)."""
        return to_component(read_part(self.at(component)), **options)


# Student and teacher share everything but the denoiser and the scheduler, so one folder holds both.
_TEACHER = {
    "model_index.json": "model_index_teacher.json",
    "unet": "unet_teacher",
    "transformer": "transformer_teacher",
    "scheduler": "scheduler_teacher",
}
# The small SD3 uses the autoencoder, the first CLIP and the tokenizer of "openmoji".
_SHARED = {
    name: f"../openmoji/{name}" for name in ("vae", "text_encoder", "tokenizer", "image_encoder", "reference")
} | {"tokenizer_2": "../openmoji/tokenizer"}
BUNDLED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "openmoji": ("openmoji", {}),
    "openmoji-teacher": ("openmoji", _TEACHER),
    "openmoji-lcm-lora": ("openmoji/lora", {}),
    "openmoji-sd3": ("openmoji_sd3", _SHARED),
    "openmoji-sd3-teacher": ("openmoji_sd3", _SHARED | _TEACHER),
    "openmoji-sd3-lcm-lora": ("openmoji_sd3/lora", {}),
}

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./ -]+\.safetensors))?(?:@([\w./-]+))?")
_FILES = (".safetensors", ".json", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".zip", ".program", ".yaml")
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model")  # configs and indexes, tokenizers
_UNUSED = ("safety_checker/*",)


def wanted(variant: str | None = None) -> list[str]:
    """Return patterns of the files to download from a repository: one precision's safetensors, never a pickle.

    variant: the precision, such as "fp16"; None is the one without a name.
    """
    dot = "" if variant is None else f".{variant}"
    return [
        f"*model{dot}.safetensors",  # model, diffusion_pytorch_model, adapter_model
        f"*model{dot}-?????-of-?????.safetensors",
        f"*model-?????-of-?????{dot}.safetensors",  # as older diffusers named the shards of a variant
        "*pytorch_lora_weights.safetensors",
        "*learned_embeds.safetensors",
        *_BESIDE_WEIGHTS,
    ]


def locate(name: str | Path, variant: str | None = None, *, weights: bool = True, what: str = "model") -> Location:
    """Return the local location of a model: a path, a bundled name, or a repository of the hub, which is downloaded.

    On the hub: "owner/name", or "owner/name/file.safetensors" for that file alone, either with "@revision" (a branch, a
    tag or a commit). A name that looks like a path is one, and no hub is asked for it: "./x", "x/", "x/y.safetensors",
    and "x/y" where x is a folder here, unless it has a revision. Files that changed there are downloaded once; without
    a connection, or with HF_HUB_OFFLINE=1, the files downloaded before are used. variant: the precision to download,
    such as "fp16", and the plain files of the components that do not have it. weights: False downloads configs and
    tokenizers only. what: "model", "LoRA" or another network, of which none is bundled, for messages. Raises
    FileNotFoundError if it is in none of these places.

    >>> from lcm_jax.weights.hub import locate
    >>> location = locate("openmoji")
    >>> location.path.name, location.at("unet").name, (location.at("unet") / "config.json").is_file()
    ('openmoji', 'unet', True)
    """
    text = str(name)
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        return Location(path=path)
    if text in BUNDLED:
        inside, subfolders = BUNDLED[text]
        path = Path(str(files("lcm_jax.bundled"))) / inside
        if not path.exists():
            raise FileNotFoundError(f"{what} {name}: {path} is not in this installation; reinstall lcm-jax")
        return Location(path=path, subfolders=subfolders)
    match = _HUB_NAME.fullmatch(text)
    if match is None or _looks_like_path(text):
        kinds = {"model": False, "LoRA": True}
        known = [name for name, (folder, _) in BUNDLED.items() if folder.endswith("/lora") == kinds.get(what)]
        hint = did_you_mean(text, known) or (f"; bundled {what}s are {', '.join(known)}" if known else "")
        on_hub = f" (a repository of the hub by this name is {text}@main)" if match and not match[3] else ""
        raise FileNotFoundError(f"{what} {shown(text)}: no such file or folder{hint}{on_hub}")
    repository, file, revision = match.groups()
    patterns = wanted(variant) if weights else list(_BESIDE_WEIGHTS)
    called = f"{what} {text}"
    folder = _snapshot(called, repository, revision, patterns if file is None else [file])
    if file is None and weights and variant is not None:
        plain = [part.name for part in sorted(folder.iterdir()) if _lacks_weights(part)]
        if plain and any(folder.glob("*/*.safetensors")):  # a variant that no component has is an error, not a download
            _snapshot(called, repository, revision, [f"{part}/{pattern}" for part in plain for pattern in wanted()])
    if file is None and weights and not any(folder.rglob("*.safetensors")):
        raise FileNotFoundError(
            f"{called}: nothing was downloaded as weights (variant={variant}); a single file is given as "
            f"{repository}/NAME.safetensors; {pickles_of_hub(repository)}"
        )
    if file is not None and not (folder / file).is_file():
        raise FileNotFoundError(f"{called}: the repository {repository} has no {file}")
    return Location(path=folder if file is None else folder / file)


def _lacks_weights(folder: Path) -> bool:
    """Return whether a folder is that of a network of which no weights were downloaded."""
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))


def _looks_like_path(text: str) -> bool:
    """Return whether a name that could be a repository's is a path, mistyped: whoever has that name is not asked."""
    if text.startswith((".", "~")) or ".." in text or text.endswith("/"):
        return True
    name, _, revision = text.partition("@")
    owner, _, rest = name.partition("/")
    # The hub has no owners of these names: they are parts of its own addresses.
    if owner.lower() in ("models", "datasets", "spaces"):
        return True
    is_file = "/" not in rest and Path(rest).suffix.lower() in _FILES
    return is_file or (not revision and os.path.isdir(owner))


def _snapshot(name: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder in the hub's cache with the files of a repository that match the patterns."""

    def fetch(*, offline: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(_UNUSED),
                local_files_only=offline,
            )
        )

    try:
        return fetch(offline=False)
    except Exception as error:  # which exceptions there are depends on the HTTP library of the hub's client
        try:
            return fetch(offline=True)
        except Exception:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FileNotFoundError(
                f"{name}: neither a local file or folder, nor a repository of the hub within reach or downloaded "
                f"before ({reason:.300})"
            ) from error
