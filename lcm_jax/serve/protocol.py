"""What client and server say to each other over a WebSocket: docs/serve.md describes it for those who write clients.

Binary messages are frames and pictures, a header of 12 bytes and JPEG or PNG. Text messages are JSON objects with the
version "v" and a "type".
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from lcm_jax.serve.codec import Form
from lcm_jax.stream.controls import Controls

VERSION = 1
FRAME, PICTURE, SAME = 1, 2, 3  # kinds of binary messages: to the server; to the client, with and without bytes
MOST_TEXT = 65_536  # characters of a text message
MOST_BYTES = 2_000_000  # of a binary one

# Codes that a connection is closed with; from 4000 on they are this protocol's own.
NORMAL, GOING_AWAY, TOO_BIG, FULL = 1000, 1001, 1009, 1013
BAD_VERSION, BAD_HELLO, IDLE, FAILED, SLOW = 4000, 4001, 4002, 4003, 4004

_HEADER = struct.Struct("!BBHII")
_KEYS = {"hello": {"controls", "format"}, "set": {"controls"}, "bye": set[str]()}


class Bye(Exception):
    """Ends a connection: a code, and a reason that the client is told."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Binary(NamedTuple):
    """sequence: of the frame, or of the frame that this answers. shows: of the frame that a picture is of. waited: for
    how many milliseconds the frame that this answers had waited for its turn.
    """

    kind: int
    sequence: int
    shows: int
    body: bytes
    waited: int = 0


class Message(NamedTuple):
    """A text message of a client, its keys checked. form: what pictures are to be sent as."""

    type: str
    controls: Mapping[str, Any]
    form: Form


def pack(kind: int, sequence: int, shows: int = 0, body: bytes = b"", waited: int = 0) -> bytes:
    """A binary message."""
    return _HEADER.pack(VERSION, kind, min(waited, 0xFFFF), sequence, shows) + body


def unpack(data: bytes) -> Binary:
    """A binary message; ValueError says what is wrong with it, `Bye` with its version."""
    if len(data) < _HEADER.size:
        raise ValueError(f"a binary message has a header of {_HEADER.size} bytes, and this one has {len(data)} in all")
    version, kind, waited, sequence, shows = _HEADER.unpack_from(data)
    _check_version(version)
    return Binary(kind, sequence, shows, data[_HEADER.size :], waited)


def unpack_frame(data: bytes) -> Binary:
    """What a client may send."""
    if len(data) > MOST_BYTES:
        raise Bye(TOO_BIG, f"a message may have {MOST_BYTES} bytes, and this one has {len(data)}")
    message = unpack(data)
    if message.kind != FRAME:
        raise ValueError(f"a client sends frames, kind {FRAME}, and this is of kind {message.kind}")
    return message


def parse(text: str) -> Message:
    """A client's text message; ValueError says what is wrong with it, `Bye` with its version."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"a text message may have {MOST_TEXT} characters, and this one has {len(text)}")
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a text message must be JSON, and this is not") from None
    if not isinstance(own, dict):
        raise ValueError('a text message must be a JSON object, such as {"v": 1, "type": "set", "controls": {}}')
    _check_version(own.pop("v", None))
    kind = own.pop("type", None)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"type is {kind!r:.80}: known are {', '.join(_KEYS)}")
    for key in own:
        if key not in _KEYS[kind]:
            raise ValueError(f"{key!r:.80} is no key of {kind}: known are {', '.join(sorted(_KEYS[kind])) or 'none'}")
    controls, form = own.get("controls", {}), own.get("format", "auto")
    if not isinstance(controls, dict):
        raise ValueError(f"controls are {controls!r:.80}: give an object of names and values")
    if form not in get_args(Form):
        raise ValueError(f"format is {form!r:.80}: known are {', '.join(get_args(Form))}")
    return Message(kind, controls, form)


def message(kind: str, **fields: Any) -> str:
    """A text message of the server."""
    return json.dumps({"v": VERSION, "type": kind, **fields})


def as_json(controls: Controls) -> dict[str, Any]:
    """All controls by name, as `set` takes them."""
    return dataclasses.asdict(controls)


def _check_version(version: Any) -> None:
    if type(version) is not int or version != VERSION:
        raise Bye(BAD_VERSION, f"this server speaks version {VERSION} of its protocol, not {version!r:.20}")
