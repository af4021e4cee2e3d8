"""Print the lowest version of every requirement of pyproject.toml, as a constraints file for pip.

    python tests/lower_bounds.py > bounds.txt
    pip install --constraint bounds.txt --editable ".[train,serve,quant]"

`make test-oldest` does so, and runs the server's tests there.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("train", "serve", "quant")  # what users install; the oracles of the tests are as new as one likes
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)(?:,<[\w.]+)?$")


def lower_bounds(project: dict[str, dict[str, object]]) -> dict[str, str]:
    """Return the lowest version by the name of the requirement. Raise ValueError for one without a lower bound.

    project: the table [project] of a pyproject.toml.

    >>> lower_bounds({"dependencies": ["jax>=0.10.2"], "optional-dependencies": dict.fromkeys(EXTRAS, [])})
    {'jax': '0.10.2'}
    """
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    bounds = {}
    for line in lines:
        match = BOUND.match(line)
        if match is None:
            raise ValueError(f"pyproject.toml: {line!r} has no lower bound; write name>=version")
        bounds[match[1]] = match[2]
    return bounds


if __name__ == "__main__":
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in lower_bounds(tomllib.loads(text)["project"]).items():
        print(f"{name}=={version}")
