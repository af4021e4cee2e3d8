"""Folders and tars as a Mac, Windows and their tools leave them: the same pictures, the same captions."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from lcm_jax.data import load_source
from lcm_jax.data.records import MOST_CAPTION

MARK = "\ufeff"


def png(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(stream, "PNG")
    return stream.getvalue()


def in_folder(files: dict[str, bytes], path: Path) -> str:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return f"folder:{path}"


def in_tar(files: dict[str, bytes], path: Path) -> str:
    path.mkdir(exist_ok=True)
    with tarfile.open(path / "a.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f"tar:{path}/a.tar"


def captions(name: str) -> list[str]:
    source = load_source(name, "train", 4)
    return [source[i]["caption"] for i in range(len(source))]


def refused(words: str, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load_source(name, "train", 4)
    assert "\n" not in str(caught.value)


Pack = Callable[[dict[str, bytes], Path], str]
both = pytest.mark.parametrize("pack", [in_folder, in_tar])


@both
def test_a_byte_order_mark_is_no_caption(pack: Pack, tmp_path: Path) -> None:
    text = f"{MARK}a dog\r\n{MARK}\n".encode()
    assert captions(pack({"a.png": png(), "a.txt": text}, tmp_path / "marked")) == ["a dog"]
    for i, empty in enumerate((MARK, f" {MARK}\n", "")):
        refused("a.txt: empty caption", pack({"a.png": png(), "a.txt": empty.encode()}, tmp_path / str(i)))


def test_a_metadata_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.png", "text": f"{MARK}{name}", "synthetic": f"{name}{MARK} "} for name in "ab"]
    table = "\r\n".join(map(json.dumps, rows)).encode("utf-8-sig")
    name = in_folder({"a.png": png(), "b.png": png(), "metadata.jsonl": table}, tmp_path)
    source = load_source(name, "train", 4)
    assert [(source[i]["caption"], source[i]["synthetic_caption"]) for i in (0, 1)] == [("a", "a"), ("b", "b")]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": MARK}))
    refused('metadata.jsonl:1: "text": empty caption', name)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_lines_of_metadata_end_at_newlines_alone(end: str, tmp_path: Path) -> None:
    texts = [f"one{end}two", f"{end}three{end}"]
    if ord(end) < 32:  # JSON has these escaped inside a text, and may not have them between
        rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    else:
        rows = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    table = "\n".join(rows).encode()
    name = in_folder({"0.png": png(), "1.png": png(), "metadata.jsonl": table}, tmp_path)
    assert captions(name) == [text.strip() for text in texts]


@both
def test_what_a_mac_leaves_beside_the_pictures_is_passed_over(pack: Pack, tmp_path: Path) -> None:
    files = {"a.png": png(), "a.txt": b"a", "in/b.png": png(), "in/b.txt": b"b"}
    left = {f"{folder}{name}": b"\0\5\x16\7" for folder in ("", "in/") for name in ("._a.png", "._a.txt", ".DS_Store")}
    left |= {f"__MACOSX/{name}": data for name, data in files.items()} | {"__MACOSX/in/._b.png": b""}
    left |= {".thumbnails/c.png": png(), ".git/d.txt": b"d", ".e.png": png()}
    assert captions(pack(left | files, tmp_path)) == ["a", "b"]


@both
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_in_one_form_of_unicode(pack: Pack, form: str, tmp_path: Path) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    picture, text = (unicodedata.normalize(form, "café/é") for form in (form, other))
    assert captions(pack({f"{picture}.png": png(), f"{text}.txt": b"a"}, tmp_path)) == ["a"]


def test_names_in_metadata_are_compared_in_one_form(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "é.png")
    rows = [
        {"file_name": unicodedata.normalize("NFC", rf"in\{nfd}"), "text": "a"},
        {"file_name": "./b.png", "text": "b"},
    ]
    table = "\n".join(map(json.dumps, rows)).encode()
    name = in_folder({f"in/{nfd}": png(), "b.png": png(), "metadata.jsonl": table}, tmp_path)
    assert captions(name) == ["b", "a"]
    (tmp_path / "in" / unicodedata.normalize("NFC", nfd)).write_bytes(png())
    refused("in another form of Unicode; rename one of them", name)


@both
def test_names_with_backslashes(pack: Pack, tmp_path: Path) -> None:
    """As an archive of Windows has them: the folder is a part of the name, or in one file of the sample alone."""
    assert captions(pack({r"in\a.png": png(), "in/a.txt": b"a"}, tmp_path)) == ["a"]


@both
@pytest.mark.parametrize("suffix", [".TXT", ".caption", ".Caption"])
def test_endings_of_captions(pack: Pack, suffix: str, tmp_path: Path) -> None:
    assert captions(pack({"a.png": png(), f"a{suffix}": b"a"}, tmp_path)) == ["a"]


@both
def test_two_captions_of_one_picture_are_refused(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a second caption beside|are of one sample"):
        load_source(pack({"a.png": png(), "a.txt": b"a", "a.caption": b"b"}, tmp_path), "train", 4)


@both
def test_endings_of_pictures(pack: Pack, tmp_path: Path) -> None:
    """Each is read as Pillow reads it."""
    forms = {".jfif": "JPEG", ".gif": "GIF", ".tif": "TIFF", ".TIFF": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}
    forms |= {".avif": "AVIF"} if features.check("avif") else {}
    files: dict[str, bytes] = {}
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (2, 2, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    for i, (suffix, form) in enumerate(sorted(forms.items())):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, form)
        files |= {f"{i}{suffix}": stream.getvalue(), f"{i}.txt": suffix.encode()}
    source = load_source(pack(files, tmp_path), "train", 16)
    assert [source[i]["caption"] for i in range(len(source))] == sorted(forms)
    pictures = [data for name, data in files.items() if not name.endswith(".txt")]
    for i, data in enumerate(pictures):
        with Image.open(io.BytesIO(data)) as picture:
            assert np.array_equal(source[i]["image"], np.asarray(picture.convert("RGB")))


@both
def test_captions_are_bounded(pack: Pack, tmp_path: Path) -> None:
    most = pack({"a.png": png(), "a.txt": b"x" * MOST_CAPTION}, tmp_path / "most")
    assert captions(most) == ["x" * MOST_CAPTION]
    more = pack({"a.png": png(), "a.txt": b"x" * (MOST_CAPTION + 1)}, tmp_path / "more")
    refused(f"a.txt: caption of {MOST_CAPTION + 1} bytes; shorten it to at most {MOST_CAPTION}", more)


def test_metadata_is_bounded(tmp_path: Path) -> None:
    name = in_folder({"a.png": png(), "metadata.jsonl": b"[" * 100_000}, tmp_path)
    refused("metadata.jsonl:1: not JSON", name)
    (tmp_path / "metadata.jsonl").write_bytes(b" " * 3_000_000)
    refused("metadata.jsonl:1: a line of 1048576 characters or more", name)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x" * (MOST_CAPTION + 1)}))
    refused('metadata.jsonl:1: "text": caption of 65537 bytes', name)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    refused("metadata.jsonl: not UTF-8 text", name)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\\ud800"}')
    refused('metadata.jsonl:1: "text": caption holds half of a character', name)


@pytest.mark.parametrize("name", ["a.png", "a.txt"])
def test_only_plain_files_are_read(name: str, tmp_path: Path) -> None:
    """A pipe would wait for ever, and a device has no end."""
    folder = in_folder({"a.png": png(), "a.txt": b"a"}, tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(f"{tmp_path / name}: not a plain file", folder)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(f"{tmp_path / name}: not a plain file", folder)


def test_links_to_plain_files_are_followed(tmp_path: Path) -> None:
    in_folder({"a.png": png("lime"), "a.txt": b"a"}, tmp_path / "store")
    (tmp_path / "links").mkdir()
    for name in ("a.png", "a.txt"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "links" / "b.png").symlink_to("nowhere")
    assert captions(f"folder:{tmp_path / 'links'}") == ["a"]


def test_hard_links_in_tars_are_the_files_that_they_name(tmp_path: Path) -> None:
    files = {"a.png": png("lime"), "a.txt": b"green"}
    name = in_tar(files, tmp_path)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for link, target in (("b.png", "a.png"), ("b.txt", "./a.txt"), ("c.png", "b.png"), ("c.txt", "a.txt")):
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    source = load_source(name, "train", 4)
    assert [source[i]["caption"] for i in range(3)] == ["green"] * 3
    assert all((source[i]["image"] == (0, 255, 0)).all() for i in range(3))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("d.png")
        info.type, info.linkname = tarfile.LNKTYPE, "e.png"
        tar.addfile(info)
    refused("a.tar: d.png is a link to e.png, which is not in the tar", name)


def sparse(path: Path, size: int) -> Path:
    """A tar with one sparse member of `size` bytes, none of which are stored (the PAX format, version 1.0)."""
    data = b"0\n".ljust(512, b"\0")
    info = tarfile.TarInfo("GNUSparseFile/a.png")
    info.size = len(data)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a.png",
        "GNU.sparse.realsize": str(size),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
        text = tarfile.TarInfo("a.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"a"))
    return path


def test_a_sparse_member_is_refused_and_not_read(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.tar", 20 * 2**30)
    refused("a.tar: a.png is a sparse file; write the tar again without --sparse", f"tar:{path}")


def test_a_member_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    size = 20 * 2**30
    info, text = tarfile.TarInfo("a.png"), tarfile.TarInfo("a.txt")
    info.size, text.size = size, 1
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(text.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0") + info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(stream.tell() + size + 1024)
    refused(f"a.tar:a.png: {size} bytes, and a picture's file has at most", f"tar:{tmp_path / 'a.tar'}")


def test_a_tar_written_anew_while_it_is_open_is_not_read(tmp_path: Path) -> None:
    """Its files lie elsewhere in it: a picture with another's caption."""
    name = in_tar({"a.png": png(), "a.txt": b"a"}, tmp_path)
    source = load_source(name, "train", 4)
    in_tar({"0.png": png("lime"), "0.txt": b"0", "a.png": png(), "a.txt": b"a"}, tmp_path)
    with pytest.raises(ValueError, match=r"a\.tar: has changed since it was opened; start again"):
        source[0]
