"""Files of tensors and configs: safetensors, whole or sharded, and JSON. Nothing here ever unpickles.

Tensors are views of the memory-mapped file, so a checkpoint larger than memory can be converted one tensor at a time.
Everything is written aside in the same folder and then renamed: a reader sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CONVERT = (
    'convert it where you trust it: python -c "import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], '
    "weights_only=True); s.save_file({k: v.contiguous() for k, v in d.get('state_dict', d).items()}, "
    "sys.argv[1] + '.safetensors')\" FILE"
)


def _pickle_error(path: Path) -> ValueError:
    return ValueError(f"{path}: a pickle can run code when it is read, so {path.suffix} files are refused; {_CONVERT}")


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its header, once the whole file has been checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix in _PICKLES:
        raise _pickle_error(path)
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` beside it")
        try:
            with safe_open(path, framework="np"):  # checks the header, the offsets and that the data is all there
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors."""
    return _header(Path(path))[1].get("__metadata__", {})


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every tensor of one file, as read-only views of its memory map."""
    path = Path(path)
    start, header = _header(path)
    header.pop("__metadata__", None)
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, which is not supported; cast it to F32")
        begin, end = entry["data_offsets"]
        tensor = data[start + begin : start + end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
    return tensors


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """The tensors that a model.safetensors.index.json spreads over files of its own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map, so not the index of a sharded checkpoint")
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard == "..":
            raise ValueError(f"{index}: {name} points to {shard!r}; shards must be file names in the same folder")
        if shard not in shards:
            shards[shard] = read_safetensors(index.parent / shard)
        if name not in shards[shard]:
            raise ValueError(f"{index}: {name} is not in {shard}; the index and its shards do not belong together")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _find(folder: Path, stem: str, variant: str | None) -> Path:
    """The safetensors file, or the index of shards, that holds a network in its folder."""
    names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    if variant is not None:
        names = [f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p.name for p in folder.glob("*") if p.name.endswith((".safetensors", ".safetensors.index.json")))
    pickles = sorted(p for p in folder.glob("*") if p.suffix in _PICKLES)
    if pickles and not others:
        raise _pickle_error(pickles[0])
    there = f"there are {', '.join(others)} (choose by variant= or by path)" if others else "it has no safetensors"
    raise FileNotFoundError(f"{folder}: neither {names[0]} nor {names[1]}; {there}")


def load_tensors(
    path: str | os.PathLike[str], stem: str = "diffusion_pytorch_model", variant: str | None = None
) -> dict[str, np.ndarray]:
    """Named tensors of a .safetensors file, an index of shards, or a network's folder.

    stem: the file name in a folder, "model" for text encoders. variant: such as "fp16", for stem.fp16.safetensors.
    Raises FileNotFoundError or ValueError, naming the file, where it is absent, cut off, corrupt or a pickle.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path, stem, variant)
    if path.suffix == ".json":
        return _read_shards(path)
    if path.is_file() and path.suffix not in (".safetensors", *_PICKLES):
        raise ValueError(f"{path}: unknown kind of weights {path.suffix!r}; give a .safetensors file or its folder")
    return read_safetensors(path)


def _umask() -> int:
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    return mask


_UMASK = _umask()  # once, at import: setting it is seen by every thread


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to it at the end and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield aside
        aside.chmod(0o666 & ~_UMASK)  # safetensors gives new files to their owner alone
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file at once or not at all. Metadata "format": "pt" is added: diffusers asks for it."""
    arrays = {name: np.require(np.asarray(tensor), requirements="C") for name, tensor in tensors.items()}
    with _aside(Path(path)) as aside:
        save_file(arrays, aside, metadata={"format": "pt", **(metadata or {})})


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that holds one object, such as a config.json."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON, or no UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a JSON object at once or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with _aside(Path(path)) as aside:
        aside.write_text(text, encoding="utf-8")
