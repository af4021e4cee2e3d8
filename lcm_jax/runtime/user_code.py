"""Objects of a user's own Python file, by a reference such as "my_file.py:my_config"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_REFERENCE = re.compile(r"(?P<module>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_reference(text: str) -> bool:
    """Return whether a text is meant as "FILE.py:NAME" or "MODULE:NAME", the name perhaps forgotten.

    >>> from lcm_jax.runtime.user_code import is_reference
    >>> is_reference("my_file.py:my_config"), is_reference("openmoji_lcm"), is_reference("folder:my/pictures")
    (True, False, False)
    """
    return _REFERENCE.fullmatch(text) is not None or text.removesuffix(":").endswith(".py")


def load_object(reference: str, *, option: str) -> Any:
    """Import the file or module of a reference, "FILE.py:NAME" or "MODULE:NAME", and return the object of that name.

    This runs the file's code: give it only what the user typed, never a name that was read from a file. A file is
    imported once, and may import others of its folder. option: named in errors, such as "--config".

    ValueError for a text of another form or a name that the file does not have, FileNotFoundError for an absent file,
    ModuleNotFoundError for an absent module; other errors of the file come through as they are.

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
    name = re.sub(r"\W", "_", path.stem)
    module = sys.modules.get(name)
    known = getattr(module, "__file__", None) if module is not None else _origin(name)
    ours = known is not None and Path(known).resolve() == path
    if module is not None and ours:
        return module
    if module is not None or (known is not None and not ours):
        raise ValueError(f"{option}: {path.name} has the name of another Python module, {known}; rename your file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{option}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))  # at the end, so that none of its neighbours hides a module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        del sys.modules[name]
        raise ModuleNotFoundError(f"{option}: {path}: {error}", name=error.name) from error
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def is_same_definition(first: Any, second: Any) -> bool:
    """Return whether two objects are one, or one class or function of a module that was imported again.

    >>> from lcm_jax.runtime.user_code import is_same_definition
    >>> is_same_definition(int, int), is_same_definition(int, float)
    (True, False)
    """
    if first is second:
        return True
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (first, second)]
    return None not in names[0] and names[0] == names[1]


def call_without_arguments(function: Callable[..., Any], *, source: str) -> Any:
    """Call a function or class of a user's file; ValueError, which names `source`, where it needs arguments.

    >>> from lcm_jax.runtime.user_code import call_without_arguments
    >>> call_without_arguments(lambda width: width, source="--config my.py:make")
    Traceback (most recent call last):
    ValueError: --config my.py:make: it needs arguments (width); give a function without any
    """
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(f"{source}: it needs arguments ({', '.join(needed)}); give a function without any")
    return function()


def _origin(name: str) -> str | None:
    """Return the file of the module that `import name` would load, or what kind of module it is; None for none."""
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin
