"""Files of tensors and configs: safetensors, single or sharded, and JSON. Nothing here ever unpickles.

Tensors are views of the memory-mapped file, so a checkpoint larger than memory can be converted one tensor at a time.
A header is accepted only if it accounts for every byte of its file; opening a file reads no more than the header. Files
are written under another name in the same folder and then renamed: a reader sees the old file or the new one.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lcm_jax.runtime.atomic_files import dump_json, written_aside
from lcm_jax.runtime.json_text import parse_json
from lcm_jax.runtime.messages import few

_DTYPES: dict[str, Any] = {  # in the order of the safetensors library, which writes the last of them first
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_ORDER = {code: i for i, code in enumerate(_DTYPES)}
# The bits of infinity, or of NaN for dtypes without infinity. Larger bit patterns of that sign are not finite either.
_NOT_FINITE = {
    np.dtype(dtype): int(np.array(np.inf).astype(dtype).view(f"u{np.dtype(dtype).itemsize}"))
    for code, dtype in _DTYPES.items()
    if "F" in code
}
_CHUNK = 1 << 18  # elements: they are read twice, the second time from the cache
_HEADER_LIMIT = 100_000_000  # bytes, the format's own
_JSON_LIMIT = 4 << 20  # bytes; configs have a few thousand
_INDEX_LIMIT = 64 << 20
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class _Entry(NamedTuple):
    """The header's entry of a tensor."""

    begin: int  # bytes from the start of the data
    end: int
    code: str  # the format's name of its dtype
    shape: tuple[int, ...]


def _pickle_error(path: Path, convert: Path | None = None) -> ValueError:
    """Return the error for a pickle, with the command that converts it, or all pickles in the folder `convert`."""
    return ValueError(
        f"{path}: a pickle, which can run code when it is read, so it is refused; where you trust it, convert it with "
        f"python -m lcm_jax.weights.from_pickle {shlex.quote(str(convert or path))} (PyTorch is needed), and load again"
    )


def _absent(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")


def _entries(header: dict[str, Any], size: int) -> dict[str, _Entry]:
    """Return the tensors of a header; ValueError unless they fill `size` bytes of data without overlap or gap."""
    entries = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": [*axes], "data_offsets": [begin, end]}:
                if all(type(n) is int and n >= 0 for n in (*axes, begin, end)):
                    entries[name] = _Entry(begin, end, code, tuple(axes))
        if name not in entries:
            raise ValueError(f"its header does not say what {name!r:.160} is")
    position = 0
    for name, (begin, end, code, shape) in sorted(entries.items(), key=lambda item: item[1]):
        if begin != position or end < begin:
            raise ValueError(f"{name!r:.160} does not begin where the tensor before it ends")
        if code in _DTYPES and math.prod(shape) * np.dtype(_DTYPES[code]).itemsize != end - begin:
            raise ValueError(f"{name!r:.160} has {end - begin} bytes, which do not make {code} of shape {shape!s:.160}")
        position = end
    if position != size:
        raise ValueError(f"it has {size} bytes of tensors, but {position} according to its header")
    return entries


def _header(path: Path) -> tuple[int, dict[str, _Entry], dict[str, str]]:
    """Return the byte where the data of a safetensors file begins, its tensors and its metadata, all checked."""
    if path.suffix.lower() in _PICKLES and os.path.isfile(path):
        raise _pickle_error(path)
    if not os.path.isfile(path):
        raise _absent(path)
    with path.open("rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(23)
        if start == b"version https://git-lfs":
            raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` beside it")
        if start[8:9] != b"{" and re.match(
            rb"PK\x03\x04|\x80[\x02-\x05]", start
        ):  # a zip or a bare pickle, as torch saves
            raise _pickle_error(path)
        length = int.from_bytes(start[:8], "little")
        try:
            if start[8:9] != b"{":
                raise ValueError("it does not begin with a header")
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"its header would have {length} bytes of {size}, at most {_HEADER_LIMIT} are allowed")
            file.seek(8)
            header = parse_json(file.read(length))
            metadata = {} if (value := header.pop("__metadata__", None)) is None else value
            if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its __metadata__ is not text")
            return 8 + length, _entries(header, size - 8 - length), metadata
        except ValueError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file, a dict of strings; it is empty if the file has none.

    >>> import tempfile, numpy as np
    >>> from lcm_jax.weights.safetensors_files import read_metadata, save_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(f"{folder}/x.safetensors", {"w": np.zeros(3)}, {"author": "me"})
    ...     read_metadata(f"{folder}/x.safetensors")
    {'format': 'pt', 'author': 'me'}
    """
    return _header(Path(path))[2]


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return every tensor of one file, as read-only views of its memory map.

    Raises FileNotFoundError, and ValueError for a pickle, a damaged file and a dtype that numpy does not have.
    """
    path = Path(path)
    start, entries, _ = _header(path)
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    tensors = {}
    for name, (begin, end, code, shape) in entries.items():
        if code not in _DTYPES:
            raise ValueError(f"{path}: {name!r:.160} has dtype {code!r:.20}, which is not supported; cast it to F32")
        try:
            tensor = data[start + begin : start + end].view(_DTYPES[code]).reshape(shape)
        except ValueError as error:  # more axes, or longer ones, than numpy has
            raise ValueError(f"{path}: {name!r:.160} cannot be read ({error})") from None
        tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
    return tensors


def release(tensor: np.ndarray) -> None:
    """Free the memory that holds the pages of a memory-mapped view; reading the view again reads the file again."""
    owner: Any = tensor
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
        first = np.frombuffer(owner, np.uint8, 1).ctypes.data
        begin = -(-(tensor.ctypes.data - first) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.ctypes.data - first + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            owner.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Return the tensors of all files that a model.safetensors.index.json names; they must be in its own folder."""
    weight_map = read_json(index, limit=_INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map, so not the index of a sharded checkpoint")
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"(?!\.\.?$)[^/\\]{1,255}", shard) or not shard.isprintable():
            rule = "shards must be file names in the same folder"
            raise ValueError(f"{index}: {name!r:.160} points to {shard!r:.160}; {rule}")
        if shard not in shards:
            shards[shard] = read_safetensors(index.parent / shard)
        if name not in shards[shard]:
            raise ValueError(
                f"{index}: {name!r:.160} is not in {shard}; the index and its shards do not belong together"
            )
    # Tensors that the index does not name are returned too: the network decides whether they may be left over.
    unindexed = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    return unindexed | {name: shards[shard][name] for name, shard in weight_map.items()}


def _names(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """Return the paths of a network's safetensors file and of the index of its shards."""
    single = folder / (f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors")
    return single, _index(single)


def find_weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """Return the safetensors file, or the index of shards, that holds a network in its folder; None if it has none.

    stem: the file's name without the suffix. variant: such as "fp16", in the name of the file.
    """
    return next((path for path in _names(folder, stem, variant) if path.is_file()), None)


def _find(folder: Path, stem: str, variant: str | None) -> Path:
    """Return what `find_weights` finds, or raise an error that names what the folder has instead."""
    found = find_weights(folder, stem, variant)
    if found is not None:
        return found
    single, index = _names(folder, stem, variant)
    others = sorted(p.name for p in folder.glob("*") if re.search(r"\.safetensors(\.index(\.\w+)?\.json)?$", p.name))
    if not others:
        check_no_pickles(folder)
    hint = f"it has {few('other files', others)}; choose by variant= or by path" if others else "it has no safetensors"
    if not others and (cached := re.search(r"models--([^/]+)--([^/]+)/snapshots/", folder.as_posix())):
        hint += f"; {pickles_of_hub('/'.join(cached.groups()))}"
    raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name}; {hint}")


def check_no_pickles(folder: Path, stems: Collection[str] = ()) -> None:
    """Raise ValueError, with the command that converts them, if a folder without safetensors has pickles of weights.

    stems: the names of the weights without their ending; empty: any.
    """
    pickles = sorted(p for p in folder.glob("*") if p.suffix.lower() in _PICKLES and (not stems or p.stem in stems))
    if pickles:
        is_pipeline = (folder.parent / "model_index.json").is_file()
        raise _pickle_error(pickles[0], folder.parent if is_pipeline else folder)


def pickles_of_hub(repository: str) -> str:
    """Return what to do about a repository of the hub whose weights may be pickles, which are not downloaded."""
    return (
        "pickles (.bin, .ckpt) are not downloaded: where you trust them, "
        f"hf download {shlex.quote(repository)} --local-dir DIR, python -m lcm_jax.weights.from_pickle DIR (PyTorch is "
        "needed), and load DIR"
    )


def load_tensors(
    path: str | os.PathLike[str], stem: str = "diffusion_pytorch_model", variant: str | None = None
) -> dict[str, np.ndarray]:
    """Return the named tensors of a .safetensors file, an index of shards, or a network's folder.

    stem: the file name in a folder, "model" for text encoders. variant: such as "fp16", for stem.fp16.safetensors.
    Raises FileNotFoundError or ValueError with the file's name if it is absent, truncated, corrupt or a pickle. The
    values are not checked: the format has no checksum, so a damaged value shows only if it is not finite (`is_finite`).

    >>> import tempfile, numpy as np
    >>> from lcm_jax.weights.safetensors_files import load_tensors, save_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(f"{folder}/x.safetensors", {"w": np.ones((2, 3), np.float16)})
    ...     tensors = load_tensors(f"{folder}/x.safetensors")
    ...     {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}
    {'w': ((2, 3), 'float16')}
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path, stem, variant)
    if path.suffix == ".json":
        return _read_shards(path)
    if path.is_file() and path.suffix.lower() not in (".safetensors", *_PICKLES):
        raise ValueError(f"{path}: unknown kind of weights {path.suffix!r}; give a .safetensors file or its folder")
    return read_safetensors(path)


def is_finite(array: np.ndarray) -> bool:
    """Return whether an array holds neither infinity nor NaN; it makes no copy of the array, whatever its strides.

    >>> import numpy as np
    >>> from lcm_jax.weights.safetensors_files import is_finite
    >>> is_finite(np.ones(3)), is_finite(np.array([1.0, np.nan]))
    (True, False)
    """
    limit = _NOT_FINITE.get(array.dtype)
    if limit is None:
        return array.dtype.kind in "biu" or bool(np.isfinite(array).all())
    # Read as integers, values that are not finite are the largest: as signed if positive, as unsigned if negative. Two
    # maxima run at the speed of memory; np.isfinite is eight times slower and has no fast path for 16 bits.
    size = array.dtype.itemsize
    sign = 1 << (8 * size - 1)
    chunks: Any = np.nditer(
        array.view(f"u{size}"), flags=["external_loop", "buffered", "zerosize_ok"], buffersize=_CHUNK, order="K"
    )
    for bits in chunks:
        if bits.size and (bits.max() >= limit | sign or bits.view(f"i{size}").max() >= limit):
            return False
    return True


def check_finite(tensors: Mapping[str, np.ndarray], source: str | os.PathLike[str]) -> None:
    """Raise ValueError if any tensor holds infinity or NaN; it names ten of them and their number.

    source: the file that the message names.
    """
    names = [repr(name) for name in tensors if not is_finite(tensors[name])]
    if names:
        raise ValueError(f"{source}: {few('tensors', names)} hold infinity or NaN; copy or download it again")


def _index(path: Path) -> Path:
    """Return the index of shards that replaces x.safetensors or x.fp16.safetensors, as diffusers names it."""
    stem = path.name.removesuffix(".safetensors")
    base, _, variant = stem.rpartition(".")
    if base and variant.isidentifier():
        return path.with_name(f"{base}.safetensors.index.{variant}.json")
    return path.with_name(f"{stem}.safetensors.index.json")


def _describe(name: str, tensor: Any) -> _Entry:
    """Return dtype, shape and size of a tensor that is to be written, without a copy of it to the host."""
    tensor = tensor if hasattr(tensor, "dtype") else np.asarray(tensor)
    code = _CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name!r:.160} has dtype {tensor.dtype}, which safetensors files do not hold; cast it")
    return _Entry(0, math.prod(tensor.shape) * tensor.dtype.itemsize, code, tuple(tensor.shape))


def _bytes(name: str, tensor: Any, entry: _Entry) -> np.ndarray:
    array = np.require(np.asarray(tensor), requirements="C")
    if _describe(name, array) != entry:
        raise ValueError(f"{name!r:.160} was {entry.code} of {entry.shape} and is now {array.dtype} of {array.shape}")
    return array.reshape(-1).view(np.uint8)


def _write(path: Path, tensors: Mapping[str, Any], entries: Mapping[str, _Entry], metadata: Mapping[str, str]) -> None:
    """Write the tensors that `entries` names, byte for byte as the safetensors library does."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(entries, key=lambda name: (-_ORDER[entries[name].code], name)):
        begin, end = end, end + entries[name].end
        header[name] = {"dtype": entries[name].code, "shape": entries[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(header)[1:]:
            file.write(_bytes(name, tensors[name], entries[name]))  # type: ignore[arg-type]


def _groups(entries: Mapping[str, _Entry], limit: int) -> list[dict[str, _Entry]]:
    """Return groups of consecutive tensors with at most `limit` bytes together; a larger tensor is a group alone."""
    groups: list[dict[str, _Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if groups[-1] and filled + entry.end > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += entry.end
    return groups


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int = 10 * 10**9,
) -> None:
    """Write a .safetensors file, or shards with an index, completely or not at all.

    Each tensor is accessed twice, for its shape and dtype and then to be written, one at a time: a mapping that
    computes tensors on access needs memory for one of them. metadata: strings for the header; "format": "pt" is added,
    which diffusers requires. max_shard_size: bytes above which x.safetensors becomes x-00001-of-0000n.safetensors and
    x.safetensors.index.json, as in diffusers. Files of the other form from an earlier save are deleted. Raises
    ValueError for a dtype that the format does not have and for a tensor named "__metadata__".

    >>> import os, tempfile, numpy as np
    >>> from lcm_jax.weights.safetensors_files import save_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(f"{folder}/x.safetensors", {"a": np.ones(3), "b": np.ones(3)}, max_shard_size=24)
    ...     sorted(os.listdir(folder))
    ['x-00001-of-00002.safetensors', 'x-00002-of-00002.safetensors', 'x.safetensors.index.json']
    """
    path = Path(path)
    entries = {name: _describe(name, tensors[name]) for name in tensors}
    if "__metadata__" in entries:
        raise ValueError(f"{path}: no tensor can be called '__metadata__' in a safetensors file; rename it")
    groups, index, stem = _groups(entries, max_shard_size), _index(path), path.name.removesuffix(".safetensors")
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    new = [path] if len(groups) == 1 else [*(path.with_name(name) for name in names), index]
    with written_aside(*new) as asides:
        for aside, group in zip(asides, groups, strict=False):
            _write(aside, tensors, group, {"format": "pt", **(metadata or {})})
        if len(groups) > 1:
            weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
            total = sum(entry.end for entry in entries.values())
            dump_json(asides[-1], {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
            if any(file.exists() for file in new[:-1]):
                index.unlink(missing_ok=True)  # otherwise the old index would for a moment name old and new shards
    shard = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}\.safetensors")
    for old in (index, path, *(file for file in path.parent.iterdir() if shard.fullmatch(file.name))):
        if old not in new:
            old.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str], *, limit: int = _JSON_LIMIT) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes, such as a config.json.

    Raises FileNotFoundError, and ValueError for a larger file, invalid JSON, a key given twice or another JSON value.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise _absent(path)
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: larger than {limit >> 20} MiB, which no such JSON file is")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:  # broken JSON, or no UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value
