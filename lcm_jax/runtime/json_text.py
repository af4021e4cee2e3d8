"""JSON from files of other people: UTF-8, each key once, and nested no deeper than any file of a model is."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

MOST_NESTED = 64  # objects and lists within each other; tokenizer.json, the deepest that is read, has about ten


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text; ValueError if it is not valid, names a key twice or is nested too deeply.

    What is nested more than `MOST_NESTED` times would end Python's recursion wherever it is walked later.

    >>> from lcm_jax.runtime.json_text import parse_json
    >>> parse_json(b'{"steps": [4, 8]}')
    {'steps': [4, 8]}
    >>> parse_json('{"steps": 4, "steps": 8}')
    Traceback (most recent call last):
    ValueError: it has 'steps' twice
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique)
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"it has {Counter(key for key, _ in pairs).most_common(1)[0][0]!r:.160} twice")
    return value
