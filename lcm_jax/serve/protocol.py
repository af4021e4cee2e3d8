"""The protocol between client and server over a WebSocket, which docs/serve.md describes for authors of clients.

Binary messages are frames and pictures: a header of 12 bytes, then a JPEG or PNG. Text messages are JSON objects with
the version "v" and a "type".
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from lcm_jax.runtime.json_text import parse_json
from lcm_jax.serve.codec import Form
from lcm_jax.stream.controls import Controls

VERSION = 1
FRAME, PICTURE, SAME = 1, 2, 3  # kinds of binary messages: to the server; to the client, with and without a picture
MOST_TEXT = 65_536  # characters of a text message
MOST_BYTES = 2_000_000  # of a binary one

# Codes with which a connection is closed; those from 4000 on are defined by this protocol.
NORMAL, GOING_AWAY, BAD_TEXT, POLICY, TOO_BIG, FULL = 1000, 1001, 1007, 1008, 1009, 1013
BAD_VERSION, BAD_HELLO, IDLE, FAILED, SLOW = 4000, 4001, 4002, 4003, 4004

_HEADER = struct.Struct("!BBHII")
_KEYS = {"hello": {"controls", "format"}, "set": {"controls"}, "bye": set[str]()}


class Bye(Exception):
    """An exception that ends a connection with a code and a reason, which the client is sent."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Binary(NamedTuple):
    """A binary message.

    kind: FRAME, PICTURE or SAME. sequence: the number of this frame, or of the frame that is answered. shows: the
    number of the frame that the picture shows. body: the JPEG or PNG. waited: milliseconds that the answered frame
    waited for its turn.
    """

    kind: int
    sequence: int
    shows: int
    body: bytes
    waited: int = 0


class Message(NamedTuple):
    """A text message of a client, with its keys checked.

    type: "hello", "set" or "bye". controls: those to change. form: the format in which pictures are sent to the client.
    """

    type: str
    controls: Mapping[str, Any]
    form: Form


def pack(kind: int, sequence: int, shows: int = 0, body: bytes = b"", waited: int = 0) -> bytes:
    """Return the bytes of a binary message: see `Binary`.

    >>> unpack(pack(PICTURE, 7, shows=5, body=b"..."))
    Binary(kind=2, sequence=7, shows=5, body=b'...', waited=0)
    """
    return _HEADER.pack(VERSION, kind, min(waited, 0xFFFF), sequence, shows) + body


def unpack(data: bytes) -> Binary:
    """Return a binary message. Raise ValueError if it is too short, `Bye` if it is of another version."""
    if len(data) < _HEADER.size:
        raise ValueError(f"a binary message has a header of {_HEADER.size} bytes, and this one has {len(data)} in all")
    version, kind, waited, sequence, shows = _HEADER.unpack_from(data)
    _check_version(version)
    return Binary(kind, sequence, shows, data[_HEADER.size :], waited)


def unpack_frame(data: bytes) -> Binary:
    """Return a client's frame. Raise ValueError if it is none, `Bye` if it is too large or of another version."""
    if len(data) > MOST_BYTES:
        raise Bye(TOO_BIG, f"a message may have at most {MOST_BYTES} bytes, and this one has {len(data)}")
    message = unpack(data)
    if message.kind != FRAME:
        raise ValueError(f"a client may send frames, kind {FRAME}, and this message is of kind {message.kind}")
    return message


def parse(text: str) -> Message:
    """Return a client's text message. Raise ValueError, which says what is wrong, or `Bye` for another version.

    >>> parse('{"v": 1, "type": "set", "controls": {"steps": 4}}')
    Message(type='set', controls={'steps': 4}, form='auto')
    """
    if len(text) > MOST_TEXT:
        raise ValueError(f"a text message may have at most {MOST_TEXT} characters, and this one has {len(text)}")
    fields = parse_object(text, "a text message", '{"v": 1, "type": "set", "controls": {}}')
    _check_version(fields.pop("v", None))
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"type is {kind!r:.80}: known are {', '.join(_KEYS)}")
    for key in fields:
        if key not in _KEYS[kind]:
            raise ValueError(f"{key!r:.80} is no key of {kind}: known are {', '.join(sorted(_KEYS[kind])) or 'none'}")
    controls, form = fields.get("controls", {}), fields.get("format", "auto")
    if not isinstance(controls, dict):
        raise ValueError(f"controls are {controls!r:.80}: give an object of names and values")
    if form not in get_args(Form):
        raise ValueError(f"format is {form!r:.80}: known are {', '.join(get_args(Form))}")
    return Message(kind, controls, form)


def parse_object(text: bytes | str, what: str, example: str) -> dict[str, Any]:
    """Return the object of a client's JSON, by HTTP or WebSocket; raise ValueError, which says what is wrong with it.

    what: its name, and example: an object that is right, for messages.

    >>> parse_object(b'{"steps": 1e400}', "the request", '{"prompt": "red heart"}')
    Traceback (most recent call last):
    ValueError: the request must be JSON: it has the number 1e400, which is not finite
    """
    try:
        value = parse_json(text, finite=True)
    except ValueError as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{what} must be JSON: {reason:.200}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, such as {example}")
    return value


def message(kind: str, **fields: Any) -> str:
    """Return a text message of the server.

    >>> message("waiting", position=2)
    '{"v": 1, "type": "waiting", "position": 2}'
    """
    return json.dumps({"v": VERSION, "type": kind, **fields})


def as_json(controls: Controls) -> dict[str, Any]:
    """Return all controls by name, as the message "set" takes them."""
    return dataclasses.asdict(controls)


def _check_version(version: Any) -> None:
    if type(version) is not int or version != VERSION:
        raise Bye(BAD_VERSION, f"this server speaks version {VERSION} of its protocol, not {version!r:.20}")
