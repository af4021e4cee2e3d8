"""Objects of a user's own Python file, by a reference such as "my_file.py:my_config"."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_REFERENCE = re.compile(r"(?P<module>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_reference(text: str) -> bool:
    """Return whether a text is "FILE.py:NAME" or "MODULE:NAME".

    >>> from lcm_jax.runtime.user_code import is_reference
    >>> is_reference("my_file.py:my_config"), is_reference("openmoji_lcm"), is_reference("folder:my/pictures")
    (True, False, False)
    """
    return _REFERENCE.fullmatch(text) is not None


def load_object(reference: str, *, option: str) -> Any:
    """Import the file or module of a reference, "FILE.py:NAME" or "MODULE:NAME", and return the object of that name.

    This runs the file's code: give it only what the user typed, never a name that was read from a file. A file is
    imported once, under its own name. option: named in errors, such as "--config".

    ValueError for a text of another form or a name that the file does not have, FileNotFoundError for an absent file,
    ModuleNotFoundError for an absent module; errors of the file itself come through as they are.

    >>> from pathlib import Path
    >>> from lcm_jax.runtime.user_code import load_object
    >>> _ = Path("my_example.py").write_text("answer = 42")
    >>> load_object("my_example.py:answer", option="--config")
    42
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{option} {reference}: give FILE.py:NAME or MODULE:NAME")
    source, name = match["module"], match["name"]
    module = import_file(Path(source), option=option) if source.endswith(".py") else importlib.import_module(source)
    if not hasattr(module, name):
        public = ", ".join(sorted(key for key in vars(module) if not key.startswith("_")))
        raise ValueError(f"{option} {reference}: {source} has no {name}; it has {public}")
    return getattr(module, name)


def import_file(path: Path, *, option: str) -> ModuleType:
    """Import a Python file of the user's, once, under its own name; errors as in `load_object`."""
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file {path}")
    path = path.resolve()
    module = sys.modules.get(path.stem)
    if module is not None and getattr(module, "__file__", None) == str(path):
        return module
    if module is not None or importlib.util.find_spec(path.stem) is not None:
        raise ValueError(f"{option}: {path.name} has the name of another Python module; rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{option}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
