"""Files of tensors: whole, sharded, every dtype; broken, hostile and pickled ones end in one line naming the file."""

from __future__ import annotations

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.numpy import load_file, save

from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights import hub
from lcm_jax.weights.hub import locate, wanted
from lcm_jax.weights.safetensors_files import (
    check_finite,
    is_finite,
    load_tensors,
    read_json,
    read_metadata,
    read_safetensors,
    save_tensors,
)

TENSORS = {
    "odd": np.arange(3, dtype=np.uint8),  # leaves what follows unaligned
    "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "half": np.arange(4, dtype=ml_dtypes.bfloat16),
    "tiny": np.arange(4, dtype=ml_dtypes.float8_e4m3fn),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float16),
}


def equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert (left[name].dtype, left[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(left[name], tensor)


def shards(folder: Path, stem: str = "model") -> Path:
    save_tensors(folder / f"{stem}-1.safetensors", {"a": TENSORS["a"]})
    save_tensors(folder / f"{stem}-2.safetensors", {"half": TENSORS["half"]})
    index = folder / f"{stem}.safetensors.index.json"
    write_json(index, {"weight_map": {"a": f"{stem}-1.safetensors", "half": f"{stem}-2.safetensors"}})
    return index


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    save_tensors(path, TENSORS)
    equal(load_tensors(path), TENSORS)
    equal(load_tensors(str(path.parent)), TENSORS)
    save_tensors(path, {"b": jnp.ones((2, 2), jnp.bfloat16)})  # over the old file
    assert load_tensors(path)["b"].dtype == ml_dtypes.bfloat16
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert all(t.flags.aligned for t in load_tensors(path).values())


def test_metadata_says_pytorch(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(2)}, {"step": "7"})
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "step": "7"}
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


def test_sharded_and_variants(tmp_path: Path) -> None:
    index = shards(tmp_path)
    wanted = {"a": TENSORS["a"], "half": TENSORS["half"]}
    equal(load_tensors(index), wanted)
    equal(load_tensors(tmp_path, stem="model"), wanted)
    with pytest.raises(FileNotFoundError, match=r"model\.fp16\.safetensors.*choose by variant"):
        load_tensors(tmp_path, stem="model", variant="fp16")
    save_tensors(tmp_path / "model.fp16.safetensors", {"odd": TENSORS["odd"]})
    assert load_tensors(tmp_path, stem="model", variant="fp16").keys() == {"odd"}


@pytest.mark.parametrize(
    "entry",
    [
        "../model-1.safetensors",
        "/model-1.safetensors",
        "..\\model-1.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "a\nb",
        "x" * 300,
        3,
    ],
)
def test_an_index_cannot_leave_its_folder(tmp_path: Path, entry: object) -> None:
    index = tmp_path / "sub" / "model.safetensors.index.json"
    save_tensors(tmp_path / "model-1.safetensors", {"a": TENSORS["a"]})
    write_json(index, {"weight_map": {"a": entry}})
    with pytest.raises(ValueError, match="must be file names in the same folder") as error:
        load_tensors(index)
    one_line(error, index)


def test_an_index_names_links_as_the_hub_caches_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    index = shards(tmp_path)
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / shard).rename(tmp_path / "blobs" / shard)
        (tmp_path / shard).symlink_to(Path("blobs") / shard)
    equal(load_tensors(index), {"a": TENSORS["a"], "half": TENSORS["half"]})
    (tmp_path / "blobs" / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors: no such file"):
        load_tensors(index)


def test_what_an_index_does_not_name_is_for_the_network_to_refuse(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_tensors(tmp_path / "model-1.safetensors", {"a": TENSORS["a"], "more": TENSORS["odd"]})
    assert load_tensors(index).keys() == {"a", "half", "more"}


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    index = shards(tmp_path)
    write_json(index, {"weight_map": {"b": "model-1.safetensors"}})
    with pytest.raises(ValueError, match=r"'b' is not in model-1\.safetensors"):
        load_tensors(index)
    write_json(index, {"weight_map": {"b": "model-9.safetensors"}})
    with pytest.raises(FileNotFoundError, match=r"model-9\.safetensors: no such file"):
        load_tensors(index)
    write_json(index, {"weight_map": {"b": "model-9.bin"}})
    (tmp_path / "model-9.bin").touch()
    with pytest.raises(ValueError, match="pickle"):
        load_tensors(index)
    write_json(index, {})
    with pytest.raises(ValueError, match="no weight_map"):
        load_tensors(index)
    (tmp_path / "model-3.safetensors").mkdir()
    write_json(index, {"weight_map": {"b": "model-3.safetensors"}})
    with pytest.raises(FileNotFoundError, match=r"model-3\.safetensors: not a file"):
        load_tensors(index)


def one_line(error: pytest.ExceptionInfo[Exception], path: Path) -> None:
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1200


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for data in (
        b"",
        b"abc",
        content[:20],
        content[:-1],
        content + b"0",
        content[:8] + b"!" * header,
        b"\x80" + content,
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a whole safetensors file") as error:
            load_tensors(path)
        one_line(error, path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_tensors(path)


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


HOSTILE = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' does not begin where"),
    "alias": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "'b' does not begin where"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "'b' does not begin where"),
    "tail": ({"a": entry([2], 0, 8)}, 9, "9 bytes of tensors, but 8 according to its header"),
    "size": ({"a": entry([3], 0, 8)}, 8, "'a' has 8 bytes"),
    "vast": ({"a": entry([2**40, 2**40], 0, 8)}, 8, "'a' has 8 bytes"),
    "backwards": ({"a": entry([2], 8, 0)}, 8, "'a' does not begin"),
    "negative": ({"a": entry([-2], 0, 8)}, 8, "does not say what 'a' is"),
    "fraction": ({"a": entry([2.0], 0, 8)}, 8, "does not say what 'a' is"),
    "true": ({"a": entry([True, 2], 0, 8)}, 8, "does not say what 'a' is"),
    "array": ({"a": ["F32", [2], [0, 8]]}, 8, "does not say what 'a' is"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "does not say what 'a' is"),
    "newline": ({"a\nb": entry([3], 0, 8)}, 8, r"'a\\nb' has 8 bytes"),
    "long name": ({"a" * 10**5: entry([3], 0, 8)}, 8, "aaa has 8 bytes"),
    "dtype": ({"a": entry([2], 0, 8, "C64")}, 8, "dtype 'C64', which is not supported"),
    "axes": ({"a": entry([1] * 70, 0, 4)}, 4, "'a' cannot be read"),
    "long axis": ({"a": entry([0, 2**62, 4], 0, 0)}, 0, "'a' cannot be read"),
    "metadata": ({"__metadata__": {"format": 1}}, 0, "__metadata__ is not text"),
    "list": (b"[]", 0, "does not begin with a header"),
    "bomb": (b'{"a":' + b"[" * 10**6, 0, "nested too deeply"),
    "digits": (b'{"a":' + b"9" * 10**5 + b"}", 0, "not a whole safetensors"),
    "bytes": (b'{"\xff":1}', 0, "not a whole safetensors"),
    "twice": (b'{"a":%(a)b,"a":%(a)b}' % {b"a": json.dumps(entry([2], 0, 8)).encode()}, 8, "it has 'a' twice"),
    "metadata twice": (b'{"__metadata__":{"a":"1","a":"2"}}', 0, "it has 'a' twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_do_not_account_for_their_file(tmp_path: Path, case: str) -> None:
    header, size, message = HOSTILE[case]
    path = raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(path)
    one_line(error, path)


def test_a_header_of_any_length_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in (3, 10**5, 99_999_999, 2**40, 2**63, 2**64 - 1):
        raw(path, b"{}", length=length)
        assert peak(lambda: refused(load_tensors, path)) < 1 << 20
    raw(path, b"{", length=200_000_000)
    os.truncate(path, 300_000_000)  # sparse: the header would be there
    assert peak(lambda: refused(load_tensors, path)) < 1 << 20
    with pytest.raises(ValueError, match="at most 100000000 are allowed") as error:
        load_tensors(path)
    one_line(error, path)


def refused(read: Callable[[Path], object], path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.safetensors|config\.json"):
        read(path)


def peak(run: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at once while running."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_tensors_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(1 << 20, np.float32)})
    assert peak(lambda: load_tensors(tmp_path / "x.safetensors")) < 1 << 16
    with pytest.raises(ValueError, match="read-only"):
        load_tensors(tmp_path / "x.safetensors")["a"][0] = 1


def test_pickles_are_recognised_under_another_name(tmp_path: Path) -> None:
    path, archive = tmp_path / "diffusion_pytorch_model.safetensors", io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
    for data in (archive.getvalue(), pickle.dumps({"a": 1}), pickle.dumps({"a": 1}, protocol=2)):
        path.write_bytes(data)
        for where in (path, tmp_path):
            with pytest.raises(ValueError, match=r"a pickle.*can run code.*from_pickle") as error:
                load_tensors(where)
            one_line(error, path)
    # A header of 0x280 bytes begins like a pickle of protocol 2.
    save_tensors(path, {"a": np.zeros(3, np.float32)}, {"pad": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    save_tensors(path, {"a": np.zeros(3, np.float32)}, {"pad": " " * (0x280 - length)})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert load_tensors(path).keys() == {"a"}


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl", ".CKPT"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"diffusion_pytorch_model{suffix}"
    path.write_bytes(b"\x80\x04.")
    for where in (path, tmp_path):
        with pytest.raises(ValueError, match=r"can run code.*from_pickle") as error:
            load_tensors(where)
        one_line(error, path)


def test_absent_and_unknown_files(tmp_path: Path) -> None:
    for path in (tmp_path / "x.safetensors", tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_tensors(path)
        one_line(error, path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"unknown kind of weights '\.gguf'"):
        load_tensors(tmp_path / "x.gguf")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"a": 1})
    save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"a": object()})
    with pytest.raises(Exception, match=r"(?i)dtype|object"):
        save_tensors(tmp_path / "x.safetensors", {"a": np.array([object()])})
    assert read_json(tmp_path / "config.json") == {"a": 1}
    assert load_tensors(tmp_path / "x.safetensors").keys() == {"a"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "x.safetensors"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"name": "雪", "sizes": [1, 2]})
    assert read_json(path) == {"name": "雪", "sizes": [1, 2]} == json.loads(path.read_text(encoding="utf-8"))
    for data, message in (
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "it has 'c' twice"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b'{"a": ' + b"9" * 10**5 + b"}", "not valid JSON"),
        (b"{}" + b" " * (4 << 20), "larger than 4 MiB"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_json(path)
        one_line(error, path)
    os.truncate(path, 1 << 30)
    assert peak(lambda: refused(read_json, path)) < 1 << 18
    for missing, message in ((tmp_path / "none.json", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(FileNotFoundError, match=message):
            read_json(missing)


def test_files_are_readable_by_others_as_the_umask_allows(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Values that are not finite.


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_finite_for_every_bit_pattern(dtype: type) -> None:
    bits = np.arange(1 << 8 * np.dtype(dtype).itemsize, dtype=f"u{np.dtype(dtype).itemsize}")
    values = bits.view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    assert is_finite(values[finite])
    assert [is_finite(values[i : i + 1]) for i in range(0, len(values), 7)] == finite[::7].tolist()
    assert not any(is_finite(values[i : i + 1]) for i in np.flatnonzero(~finite)[::5])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_in_wide_floats(dtype: type) -> None:
    info = np.finfo(dtype)
    good = np.array([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal, -1.0], dtype)
    assert is_finite(good)
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for index in (0, 500_000, 600_000):  # in the first chunk, and in later ones
            array = np.tile(good, 100_000)
            array[index] = bad
            assert not is_finite(array)
            assert not is_finite(array.reshape(7, -1).T[::-1])
    assert is_finite(np.zeros((3, 0), dtype))
    assert not is_finite(np.array(np.nan, dtype))


def test_finite_takes_the_strides_as_they_are() -> None:
    array = np.zeros((1000, 2000), np.float32)
    array[1, 1] = np.nan
    assert is_finite(array[::2])
    assert is_finite(array[:, ::2])
    assert not is_finite(array[1::2, 1::2])
    assert is_finite(np.broadcast_to(np.float32(1), (10**4, 10**4)))
    wide = np.zeros(8 << 20, np.float16)
    assert peak(lambda: is_finite(wide)) < 1 << 20
    assert peak(lambda: is_finite(wide.reshape(2, -1)[:, ::2])) < 4 << 20
    for dtype in (bool, np.uint8, np.int64):
        assert is_finite(np.ones(3, dtype))
    assert not is_finite(np.array([1, np.nan], np.complex64))
    assert not is_finite(np.array([1, np.nan], ">f4"))


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = {f"{i:02}": np.full(2, np.nan if i % 2 else i, np.float32) for i in range(30)}
    with pytest.raises(ValueError, match=r"x: 15 tensors \('01', .*'19', and 5 more\) hold infinity or NaN") as error:
        check_finite(tensors, tmp_path / "x")
    one_line(error, tmp_path / "x")
    check_finite({name: tensor for name, tensor in tensors.items() if int(name) % 2 == 0}, "x")


# Writing.


@pytest.mark.parametrize("dtypes", [("f4",), ("f2", "f4", "f8", "i8", "u8", "i4", "u4", "i2", "u2", "i1", "u1", "?")])
def test_bytes_are_those_of_the_library(tmp_path: Path, dtypes: tuple[str, ...]) -> None:
    kinds = [*map(np.dtype, dtypes), ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    names = ["b", "a.10", "a.9", "Z", "é", '"\\\x1f\n\t\x7f', "雪", "𝄞"]
    rng = np.random.default_rng(0)
    for metadata in ({}, {"format": "pt"}):
        tensors = {
            f"{name}{np.dtype(kind)}": rng.integers(0, 2, size=(i, 3)).astype(kind)
            for i, name in enumerate(names)
            for kind in kinds
        }
        tensors["scalar"] = np.array(1.5, np.float32)
        save_tensors(tmp_path / "x.safetensors", tensors, metadata)
        assert (tmp_path / "x.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    equal(load_tensors(tmp_path / "x.safetensors"), tensors)


class Made(Mapping):
    """Tensors of 1 MiB that exist only while they are asked for."""

    def __init__(self, broken: str | None = None) -> None:
        self.broken, self.asked = broken, 0

    def __getitem__(self, name: str) -> np.ndarray:
        self.asked += 1
        if self.asked > len(self) and name == self.broken:
            raise RuntimeError(name)
        return np.full((256, 1024), int(name), np.float32)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(8))

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("limit", [10**10, 3 << 20])
def test_writing_needs_memory_for_one_tensor(tmp_path: Path, limit: int) -> None:
    made = Made()
    assert peak(lambda: save_tensors(tmp_path / "model.safetensors", made, max_shard_size=limit)) < 1.2 * (1 << 20)
    assert made.asked == 16
    equal(load_tensors(tmp_path, stem="model"), dict(Made()))


def test_shards_are_those_of_diffusers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t.{i}": np.full(rng.integers(1, 25), i, np.float32) for i in rng.permutation(40)}
    save_tensors(tmp_path / "model.safetensors", tensors, {"a": "b"}, max_shard_size=100)
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda x: x.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=100
    )
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    assert {p.name for p in tmp_path.iterdir()} == {*split.filename_to_tensors, "model.safetensors.index.json"}
    for file, names in split.filename_to_tensors.items():
        equal(load_file(tmp_path / file), {name: tensors[name] for name in names})
        assert read_metadata(tmp_path / file) == {"format": "pt", "a": "b"}
    equal(load_tensors(tmp_path, stem="model"), tensors)
    save_tensors(tmp_path / "model.safetensors", {**tensors, "large": np.ones(26, np.float32)}, max_shard_size=100)
    assert read_safetensors(max(tmp_path.glob("model-*"))).keys() == {"large"}  # alone, though above the limit


def test_shards_of_a_variant(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.fp16.safetensors", TENSORS, max_shard_size=20)
    assert (tmp_path / "model.safetensors.index.fp16.json").is_file()
    assert (tmp_path / "model.fp16-00001-of-00003.safetensors").is_file()
    equal(load_tensors(tmp_path, stem="model", variant="fp16"), TENSORS)
    save_tensors(tmp_path / "sd3.5_large.safetensors", TENSORS, max_shard_size=20)
    equal(load_tensors(tmp_path / "sd3.5_large.safetensors.index.json"), TENSORS)


OLD, NEW = ({f"{i}": np.full(2, i + start, np.float32) for i in range(4)} for start in (0, 10))


@pytest.mark.parametrize(("before", "after"), [(8, 8), (8, 100), (100, 8), (100, 100), (8, 16), (16, 8)])
def test_a_reader_sees_the_old_or_the_new_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    path, others = tmp_path / "model.safetensors", tmp_path / "model-00001-of-00002.fp16.safetensors"
    save_tensors(others, OLD)
    save_tensors(path, OLD, max_shard_size=before)
    loaded = []

    def reload() -> None:
        try:
            loaded.append(load_tensors(tmp_path, stem="model")["0"][0])
        except FileNotFoundError:
            return
        equal(load_tensors(tmp_path, stem="model"), NEW if loaded[-1] == 10 else OLD)

    def watched(act: Callable) -> Callable:
        def run(*args: object, **options: object) -> None:
            reload()
            act(*args, **options)
            reload()

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        save_tensors(path, NEW, max_shard_size=after)
    assert loaded[0] == 0
    assert loaded[-1] == 10
    assert loaded == sorted(loaded)
    equal(load_tensors(tmp_path, stem="model"), NEW)
    sharded = after < 32
    assert path.exists() != sharded
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert len(list(tmp_path.iterdir())) == 1 + (32 // after + 1 if sharded else 1)
    assert others.exists()


def test_a_failed_save_of_shards_leaves_the_old_ones(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", OLD, max_shard_size=8)
    with pytest.raises(RuntimeError, match="6"):
        save_tensors(tmp_path / "model.safetensors", Made(broken="6"), max_shard_size=3 << 20)
    equal(load_tensors(tmp_path, stem="model"), OLD)
    assert len(list(tmp_path.iterdir())) == 5


def test_what_no_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for value in (np.array([object()]), np.zeros(2, np.complex64), np.zeros(2, ">f4"), np.array(["a"])):
        with pytest.raises(ValueError, match=r"'a' has dtype .*cast it"):
            save_tensors(path, {"a": value})
    with pytest.raises(ValueError, match="__metadata__"):
        save_tensors(path, {"__metadata__": np.zeros(2)})
    assert not list(tmp_path.iterdir())
    save_tensors(path, {"a": [1.0, 2.0], "b": 3})
    equal(load_tensors(path), {"a": np.array([1.0, 2.0]), "b": np.array(3)})
    save_tensors(path, {})
    assert load_tensors(path) == {}


# The hub.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a download leaves behind: blobs, links to them, and the commit that each branch and tag stands for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", snapshot / "unet", repository / "refs"):
        folder.mkdir(parents=True)
    save_tensors(repository / "blobs" / "1", TENSORS)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/1")
    (snapshot / "lora.safetensors").symlink_to("../../blobs/1")
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(COMMIT)
    return snapshot


def test_offline_the_cache_serves(cache: Path) -> None:
    for name in ("owner/name", "owner/name@v1", f"owner/name@{COMMIT}", Path("owner/name")):
        assert locate(name).path == cache
        assert locate(name, "fp16").path == cache
    equal(load_tensors(locate("owner/name").path / "unet"), TENSORS)
    assert locate("owner/name/lora.safetensors@v1").path == cache / "lora.safetensors"
    with pytest.raises(FileNotFoundError, match=r"has no none\.safetensors"):
        locate("owner/name/none.safetensors")


@pytest.mark.parametrize("name", ["owner/other", "owner/name@v2", f"owner/name@{COMMIT[::-1]}", "owner/a--b", "-/-"])
def test_what_was_never_downloaded_is_one_line(cache: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="nor a repository of the hub within reach or downloaded") as error:
        locate(name)
    one_line(error, Path(name))


@pytest.mark.parametrize("name", ["", "nothing", "./a/b", "../a", "~nobody/x", "/a/b", "a/b/c", "a/../b", "a/b@../c"])
def test_names_that_are_nowhere(cache: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder; bundled models are openmoji"):
        locate(name)


def test_any_failure_of_the_network_falls_back_to_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        pass

    def unreachable(*args: object, local_files_only: bool, **options: object) -> str:
        if not local_files_only:
            raise ProxyError("first line\nsecond line")
        return snapshot_download(*args, local_files_only=True, **options)

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    assert locate("owner/name").path == cache
    with pytest.raises(FileNotFoundError, match=r"owner/other: .*ProxyError: first line second line"):
        locate("owner/other")


LISTING = [
    "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "tokenizer_3/spiece.model", "scheduler/scheduler_config.json", "safety_checker/config.json",
    "safety_checker/model.safetensors", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.safetensors.index.fp16.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "pytorch_lora_weights.safetensors",
    "unet/model.onnx", "unet/diffusion_flax_model.msgpack",
]  # fmt: skip


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_what_may_be_read_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch, variant: str | None) -> None:
    asked: dict = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda repository, **options: asked.update(options) or str(cache))
    locate("owner/name@v1", variant)
    assert asked["revision"] == "v1"
    assert asked["allow_patterns"] == wanted(variant)
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    downloaded = set(filter_repo_objects(LISTING, **patterns))
    assert not any(name.endswith((".bin", ".ckpt", ".onnx", ".msgpack", ".md")) for name in downloaded)
    assert {
        name for name in LISTING if name.endswith((".json", ".txt", ".model")) and "safety" not in name
    } < downloaded
    taken = {name for name in downloaded if name.endswith(".safetensors")}
    plain = {name for name in taken if ".fp16" not in name}
    always = {"pytorch_lora_weights.safetensors"}
    if variant is None:
        assert (
            taken
            == plain
            == always
            | {
                "text_encoder/model.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "text_encoder_3/model-00001-of-00002.safetensors",
            }
        )
    else:
        assert plain == always
        assert taken - plain == {name for name in LISTING if ".fp16" in name and name.endswith(".safetensors")}
