"""Where a model is: a bundled name, a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError


@dataclass(frozen=True, kw_only=True)
class Location:
    """A folder, and the sub-folders of it that stand in for a component's usual one."""

    path: Path
    subfolders: Mapping[str, str] = field(default_factory=dict)

    def place(self, component: str) -> str:
        """The sub-folder of a component."""
        return self.subfolders.get(component, component)


# Student and teacher share all but the UNet and the scheduler, so one folder holds both.
BUNDLED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "openmoji": ("openmoji", {}),
    "openmoji-teacher": ("openmoji", {"unet": "unet_teacher", "scheduler": "scheduler_teacher"}),
    "openmoji-lcm-lora": ("openmoji/lora", {}),
}


def locate(name: str | Path) -> Location:
    """The local place of a model; a hub id is downloaded once (safetensors, JSON and tokenizer files only)."""
    path = Path(name).expanduser()
    if path.exists():
        return Location(path=path)
    if str(name) in BUNDLED:
        folder, subfolders = BUNDLED[str(name)]
        path = Path(str(files("lcm_jax.bundled"))) / folder
        if not path.exists():
            raise FileNotFoundError(f"model {name}: {path} is not in this installation; reinstall lcm-jax")
        return Location(path=path, subfolders=subfolders)
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise FileNotFoundError(f"model {name}: no such file or folder; bundled models are {', '.join(BUNDLED)}")
    try:
        kinds = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Location(path=Path(snapshot_download(str(name), allow_patterns=kinds)))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"model {name}: neither a local folder nor a repository of the hub within reach ({reason})"
        ) from None
