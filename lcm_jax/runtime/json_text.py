"""JSON from files of other people: UTF-8, each key once, and nested no deeper than any file of a model is."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MOST_NESTED = 64  # objects and lists within each other; tokenizer.json, the deepest that is read, has about ten


def parse_json(text: bytes | str, *, finite: bool = False) -> Any:
    """Return the value of a JSON text; ValueError if it is not valid, names a key twice or is nested too deeply.

    What is nested more than `MOST_NESTED` times would end Python's recursion wherever it is walked later. A byte-order
    mark before the text, as Windows writes it, is passed over.

    finite: whether NaN, Infinity and numbers that are too large for a float are refused, which Python reads and some
    files of diffusers hold.

    >>> from lcm_jax.runtime.json_text import parse_json
    >>> parse_json(b'{"steps": [4, 8]}')
    {'steps': [4, 8]}
    >>> parse_json('{"steps": 4, "steps": 8}')
    Traceback (most recent call last):
    ValueError: it has 'steps' twice
    """
    try:
        text = (text.decode("utf-8") if isinstance(text, bytes) else text).removeprefix("\ufeff")
        numbers: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    inner = [value]
    for _ in range(MOST_NESTED + 1):
        if not inner:
            return value
        inner = [
            child
            for outer in inner
            if isinstance(outer, (dict, list))
            for child in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(child, (dict, list))
        ]
    raise ValueError("it is nested too deeply")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it has the number {text:.80}, which is not finite")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"it has {Counter(key for key, _ in pairs).most_common(1)[0][0]!r:.160} twice")
    return value
