"""The wire: what is packed is unpacked, and whatever else arrives is refused in one clear line."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import ExifTags, Image

from lcm_jax.serve import protocol
from lcm_jax.serve.codec import MOST_PIXELS, decode, encode
from lcm_jax.serve.http_images import Images
from lcm_jax.serve.protocol import Bye
from lcm_jax.stream.controls import Controls
from lcm_jax.stream.stream import fit


def picture(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def huge_png(side: int = 10_000) -> bytes:
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    head = struct.pack("!IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(90_000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("sequence", [0, 1, 2**32 - 1])
def test_binary_messages_come_back(sequence: int) -> None:
    body = bytes(range(256))
    data = protocol.pack(protocol.PICTURE, sequence, 7, body, waited=258)
    assert protocol.unpack(data) == (protocol.PICTURE, sequence, 7, body, 258)
    assert protocol.unpack(protocol.pack(protocol.SAME, sequence, waited=100_000)).waited == 65_535  # as much as fits
    assert data[:2] == bytes([1, 2])
    assert int.from_bytes(data[4:8], "big") == sequence
    assert len(data) == 12 + 256


@pytest.mark.parametrize("data", [b"", b"\x01", bytes(11)])
def test_a_binary_message_needs_its_header(data: bytes) -> None:
    with pytest.raises(ValueError, match="header of 12 bytes"):
        protocol.unpack(data)


def test_a_binary_message_of_another_version_ends_the_connection() -> None:
    with pytest.raises(Bye) as raised:
        protocol.unpack(b"\x02" + protocol.pack(protocol.FRAME, 0)[1:])
    assert raised.value.code == protocol.BAD_VERSION


def test_a_client_sends_frames_only_and_no_large_ones() -> None:
    with pytest.raises(ValueError, match="kind 1"):
        protocol.unpack_frame(protocol.pack(protocol.PICTURE, 0))
    with pytest.raises(Bye) as raised:
        protocol.unpack_frame(protocol.pack(protocol.FRAME, 0, 0, bytes(protocol.MOST_BYTES)))
    assert raised.value.code == protocol.TOO_BIG


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, True, [1]])
def test_a_text_message_of_another_version_ends_the_connection(version: object) -> None:
    with pytest.raises(Bye, match="version 1") as raised:
        protocol.parse(json.dumps({"v": version, "type": "set", "controls": {}}))
    assert raised.value.code == protocol.BAD_VERSION


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        ("[" * 60_000, "must be JSON"),
        ('{"v": 1, "x": ' + "9" * 5000 + "}", "must be JSON"),
        ("[1]", "JSON object"),
        ('{"v": 1}', "type is None"),
        ('{"v": 1, "type": "frobnicate"}', "'frobnicate': known are hello, set, bye"),
        ('{"v": 1, "type": ["set"]}', "known are"),
        ('{"v": 1, "type": "set", "contrls": {}}', "'contrls' is no key of set"),
        ('{"v": 1, "type": "set", "controls": []}', "give an object"),
        ('{"v": 1, "type": "hello", "format": "webp"}', "known are auto, jpeg, png"),
        ('{"v": 1, "type": "set", "controls": {"prompt": "' + "a" * 1_000_000 + '"}}', "65536 characters"),
    ],
)
def test_bad_text_messages_are_refused_in_one_short_line(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        protocol.parse(text)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"prompt": "a", "steps": 1e400}', "the number 1e400, which is not finite"),
        ('{"prompt": "a", "steps": -1e999}', "the number -1e999"),
        ('{"prompt": "a", "steps": NaN}', "the number NaN"),
        ('{"prompt": "a", "steps": [[Infinity]]}', "the number Infinity"),
        ('{"prompt": "a", "steps": -Infinity}', "the number -Infinity"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        ('{"prompt": ' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"prompt": "\udc80"}', "not UTF-8"),
        ("{'prompt': 1}", "Expecting property name"),
        ("7", "JSON object"),
    ],
)
def test_http_and_websocket_refuse_the_same_json(text: str, why: str) -> None:
    refused = []
    for read in (partial(protocol.parse_object, what="x", example="{}"), Images.__new__(Images)._options):
        with pytest.raises(ValueError, match=re.escape(why)) as raised:
            read(text.encode(errors="surrogateescape"))
        assert len(str(raised.value)) < 300
        refused.append(str(raised.value).split(":", 1)[-1])
    assert refused[0] == refused[1] or why == "JSON object"
    if len(text) <= protocol.MOST_TEXT and why != "not UTF-8":
        with pytest.raises(ValueError, match=re.escape(why)):
            protocol.parse(text)


def test_a_byte_order_mark_before_json_is_passed_over() -> None:
    assert protocol.parse('\ufeff{"v": 1, "type": "bye"}').type == "bye"


def test_controls_come_back_from_their_json() -> None:
    controls = Controls(prompt=[("a cat", 1.0), ("a dog", 0.5)], steps=3, similarity=0.9, seed=[(3, 1.0), (4, 2.0)])
    text = protocol.message("set", controls=protocol.as_json(controls))
    assert Controls().changed(**protocol.parse(text).controls) == controls


@pytest.mark.parametrize("changes", [{"strength": 10**400}, {"strength": math.nan}, {"prompt": [["a", 10**400]]}])
def test_numbers_that_no_control_can_hold(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"strength|prompt|NaN"):
        Controls().changed(**protocol.parse(json.dumps({"v": 1, "type": "set", "controls": changes})).controls)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_half_a_character_is_no_prompt(name: str) -> None:
    text = json.dumps({"v": 1, "type": "set", "controls": {name: "\ud83d"}})
    with pytest.raises(ValueError, match="prompt"):
        Controls().changed(**protocol.parse(text).controls)


def test_png_loses_nothing_and_jpeg_little() -> None:
    smooth = np.asarray(Image.fromarray(picture(4, 4)).resize((64, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(encode(smooth, "png")), smooth)
    there = decode(encode(smooth, "jpeg"))
    assert there.shape == smooth.shape
    assert np.abs(there.astype(int) - smooth).mean() < 3


def test_small_pictures_are_sent_without_a_loss() -> None:
    assert encode(picture(256, 256), "auto").startswith(b"\x89PNG")
    assert encode(picture(256, 257), "auto").startswith(b"\xff\xd8")


def test_transparency_is_white() -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue()), np.full((4, 4, 3), 255, np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK"])
def test_every_kind_of_pixel_becomes_three_bytes(mode: str) -> None:
    out = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(out, "JPEG" if mode == "CMYK" else "PNG")
    pixels = decode(out.getvalue(), (8, 8))
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8


def test_a_large_jpeg_is_decoded_at_a_fraction_and_cropped_alike() -> None:
    smooth = np.asarray(Image.fromarray(picture(5, 8)).resize((1600, 1000), Image.Resampling.BICUBIC))
    data = encode(smooth, "jpeg")
    assert np.abs(decode(data, (64, 64)).astype(int) - fit(decode(data), (64, 64))).mean() < 2


@pytest.mark.parametrize("size", [None, (32, 48)])
def test_a_turned_jpeg_is_upright(size: tuple[int, int] | None) -> None:
    upright = Image.fromarray(picture(5, 8)).resize((960, 640), Image.Resampling.BICUBIC)
    exif, out = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right, and so saved as turned to the left
    upright.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=95, exif=exif)
    shown = decode(out.getvalue(), size)
    asked = np.asarray(upright) if size is None else fit(np.asarray(upright), size)
    assert shown.shape == asked.shape
    assert np.abs(shown.astype(int) - asked).mean() < 2


def test_more_than_8_bits_are_refused() -> None:
    out = io.BytesIO()
    Image.new("I;16", (4, 4)).save(out, "PNG")
    with pytest.raises(ValueError, match="mode I;16 is not RGB"):
        decode(out.getvalue())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        bytes(1000),
        b"GIF89a" + bytes(100),
        encode(picture())[:60],
        encode(picture(64, 64), "jpeg")[:300],
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\xff\xd8\xff" + bytes(100),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="picture") as raised:
        decode(data, (16, 16))
    assert len(str(raised.value)) < 200


def test_other_formats_are_refused() -> None:
    for form in ("GIF", "BMP", "WEBP", "TIFF"):
        out = io.BytesIO()
        Image.fromarray(picture()).save(out, form)
        with pytest.raises(ValueError, match="neither"):
            decode(out.getvalue())


@pytest.mark.parametrize("side", [4000, 10_000, 60_000])
def test_a_bomb_is_measured_and_not_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match=f"may have at most {MOST_PIXELS} pixels"):
        decode(huge_png(side), (16, 16))


def segments(number: int) -> bytes:
    """A JPEG with empty comments."""
    data = encode(picture(), "jpeg")
    return data[:2] + b"\xff\xfe\x00\x02" * number + data[2:]


def chunks(number: int, at: int) -> bytes:
    """A PNG with empty chunks of no known kind."""
    data, empty = encode(picture()), struct.pack("!I", 0) + b"teSt" + struct.pack("!I", zlib.crc32(b"teSt"))
    return data[:at] + empty * number + data[at:]


@pytest.mark.parametrize(
    "many",
    [
        segments(11_000),
        b"\xff\xd8" + b"\xff" * 11_000 + segments(0)[2:],
        b"\xff\xd8\xff\xe0\x00\x02" + bytes(11_000) + segments(0)[2:],
        b"\xff\xd8" + b"\xff\xd0" * 11_000 + segments(0)[2:],
        chunks(11_000, 33),
        chunks(11_000, -12),
    ],
    ids=["comments", "padding", "junk", "restarts", "chunks before", "chunks after"],
)
def test_a_picture_of_many_parts_is_not_read(many: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("PIL.Image.open", opened)
    with pytest.raises(ValueError, match="at most 10000 parts"):
        decode(many, (16, 16))


@pytest.mark.parametrize("some", [segments(1000), chunks(1000, 33), chunks(1000, -12)])
def test_a_picture_of_some_parts_is_read(some: bytes) -> None:
    assert decode(some).shape == (16, 16, 3)


def test_a_progressive_jpeg_is_read() -> None:
    out = io.BytesIO()
    smooth = Image.fromarray(picture(4, 4)).resize((64, 48), Image.Resampling.BICUBIC)
    smooth.save(out, "JPEG", progressive=True, quality=95)
    assert np.abs(decode(out.getvalue()).astype(int) - np.asarray(smooth)).mean() < 3
