"""The header of a single file: what describes a model beside its tensors, so that the file loads again by itself.

The key `lcm_jax` of a file's metadata holds, as JSON, the model_index.json, the scheduler config, the configs of the
networks and the files of the tokenizers. Other programs pass over it; for them the file has the keys that they know.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_jax.runtime.atomic_files import replacing
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.runtime.json_text import parse_json
from lcm_jax.weights.tokenizer_files import BINARY, TEXTS, tokenizer_files

KEY = "lcm_jax"


@dataclass(frozen=True, kw_only=True)
class Header:
    """The description of a model in the header of its single file: the contents of a folder's small files."""

    index: Mapping[str, Any]  # model_index.json
    scheduler: Mapping[str, Any]  # scheduler_config.json
    configs: Mapping[str, Mapping[str, Any]]  # component -> config.json
    tokenizers: Mapping[str, Mapping[str, str]]  # component -> file name -> text, or base64

    def to_metadata(self) -> dict[str, str]:
        """Return the entry of a file's metadata."""
        return {KEY: json.dumps(vars(self), ensure_ascii=False, separators=(",", ":"))}


def read_header(metadata: Mapping[str, str], *, source: str) -> Header | None:
    """Return the description in a file's metadata; None if there is none.

    Raises ValueError that names `source` for one that is damaged or was written by something else.
    """
    if KEY not in metadata:
        return None
    try:
        values = parse_json(metadata[KEY])
        header = Header(**{name: values[name] for name in Header.__dataclass_fields__})
        tables = (header.index, header.scheduler, header.configs, header.tokenizers)
        nested = (*header.configs.values(), *header.tokenizers.values())
        pairs = [value for value in header.index.values() if isinstance(value, list)]
        texts = [text for files in header.tokenizers.values() for text in files.values()]
        texts += [name for pair in pairs for name in pair if name is not None]
        is_complete = (
            all(isinstance(table, dict) for table in (*tables, *nested))
            and all(isinstance(text, str) for text in texts)
            and all(len(pair) == 2 for pair in pairs)
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise ValueError(
            f"{source}: the description in its header ({KEY}) cannot be read; without config= it is needed"
        )
    return header


def pack_tokenizer(folder: Path) -> dict[str, str]:
    """Return the files of a tokenizer's folder as text: file name -> text, or base64 of a binary file."""
    paths = tokenizer_files(folder)
    files = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if name != BINARY}
    if "tokenizer.json" not in files and BINARY in paths:  # in base64 where there is no tokenizer.json
        files[BINARY] = base64.b64encode(paths[BINARY].read_bytes()).decode()
    return files


def unpack_tokenizer(files: Mapping[str, str], *, source: str) -> Path:
    """Return a folder in `cache_dir` with the files that `pack_tokenizer` packed, named by a digest of them.

    Raises ValueError that names `source` for a file that no tokenizer has.
    """
    unknown = sorted(files.keys() - {*TEXTS, BINARY})
    if unknown:
        raise ValueError(f"{source}: the description in its header has the file {unknown[0]!r:.160}; give config=")
    folder = cache_dir() / "tokenizers" / hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:32]
    if not folder.is_dir():
        try:
            contents = {
                name: base64.b64decode(text, validate=True) if name == BINARY else text.encode()
                for name, text in files.items()
            }
        except (binascii.Error, UnicodeEncodeError) as error:
            raise ValueError(f"{source}: a tokenizer in its header cannot be read ({error}); give config=") from None
        with replacing(folder) as new:
            for name, content in contents.items():
                (new / name).write_bytes(content)
    return folder
