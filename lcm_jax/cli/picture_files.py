"""The files that `lcm-jax sample` writes: names that tell prompts and seeds apart, and nothing overwritten silently."""

from __future__ import annotations

import hashlib
import itertools
import mimetypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lcm_jax.runtime.image_io import SUFFIXES, write_picture

_WRITTEN = SUFFIXES - {".gif"}  # which has 256 colours
_MOST_BYTES = 120  # of a prompt in a name; file systems allow 255 for all of it


def names(out: Path, prompts: Sequence[str], num_images: int, seed: int) -> list[Path]:
    """Return the path of each picture, in the order in which they are drawn; nothing is written yet.

    `out` with the suffix of a picture is the file of one picture; ValueError for more, for a suffix of another kind of
    picture or video, and for a place that cannot be written to. Any other `out` is a folder, in which a name is the
    prompt's words, the seed unless it is 0, and the number of the picture: red-heart-seed7-0.png. Where the words do
    not tell all of the prompt (punctuation, length), six digits of its hash follow them.

    >>> from pathlib import Path
    >>> from lcm_jax.cli.picture_files import names
    >>> [path.as_posix() for path in names(Path("out"), ["red heart", "red heart!"], 1, 0)]
    ['out/red-heart-0.png', 'out/red-heart-9fe1a0-0.png']
    """
    number = len(prompts) * num_images
    suffix = out.suffix.lower()
    is_file = suffix in _WRITTEN and not out.is_dir()
    kind = (mimetypes.guess_type(out.name)[0] or "").partition("/")[0]
    if not is_file and not out.is_dir() and kind in ("image", "video"):
        raise ValueError(f"--out {out}: give a folder, or a picture's file that ends in {', '.join(sorted(_WRITTEN))}")
    if is_file and number > 1:
        raise ValueError(f"--out {out}: {number} pictures do not fit in one file; name a folder")
    folder = out.parent if is_file else out
    there = next(path for path in (folder, *folder.parents) if path.exists() or path == path.parent)
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: no permission to write in {there}")
    if is_file:
        return [out]
    middle = f"-seed{seed}" if seed else ""
    return [out / f"{_slug(prompt)}{middle}-{i}.png" for prompt in prompts for i in range(num_images)]


def write(paths: Sequence[Path], pictures: UInt8[np.ndarray, "n h w 3"], *, replace: bool) -> list[Path]:
    """Write pictures and return their paths; where a file exists the new one gets a number, as in red-heart-0-2.png.

    replace: write to a path that exists all the same, and say so; for a file that the user named.
    """
    written = []
    for path, picture in zip(paths, pictures, strict=True):
        if replace and path.exists():
            print(f"lcm-jax: {path} is replaced", file=sys.stderr)
        elif path.exists():
            others = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
            path = next(other for other in others if not other.exists())
        write_picture(path, picture)
        written.append(path)
    return written


def _slug(prompt: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in prompt).split()
    slug = "-".join(words).encode()[:_MOST_BYTES].decode(errors="ignore").rstrip("-") or "picture"
    is_all = slug.replace("-", " ") == " ".join(prompt.split())
    return slug if is_all else f"{slug}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
