"""The files of a tokenizer's folder: by name the ones that a tokenizer can have, and none from outside of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

TEXTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
BINARY = "spiece.model"  # T5's


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files of a tokenizer's folder by their names; other files there are passed over.

    Raises ValueError for a link that leads out of the model's folder: what it points to is not the model's to give
    away. The hub's cache consists of links, from a snapshot to the blobs beside it, which are followed.
    """
    found = {name: folder / name for name in (*TEXTS, BINARY) if (folder / name).is_file()}
    roots = [folder.absolute().parent.resolve()]
    roots += [parent.parent / "blobs" for parent in roots[0].parents if parent.name == "snapshots"]
    for path in found.values():
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(f"{path}: a link out of the model's folder; put a copy of the file in its place")
    return found


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the files of a tokenizer's folder to a new folder; the errors are those of `tokenizer_files`."""
    files = tokenizer_files(folder)
    target.mkdir()
    for name, path in files.items():
        shutil.copyfile(path, target / name)
