r"""The syntaxes of weighted prompts: A1111's, compel's and ComfyUI's, from text to fragments with weights.

a1111    (cat) x1.1   (cat:1.3)   [cat] /1.1   nesting multiplies   \( \) \[ \] \\ are literal   BREAK closes a chunk
         [cat:dog:0.5] cat, and dog from half of the steps on   [dog:10]   [cat::10]   [cat|dog] by turns
compel   cat+ x1.1   cat- x0.9   (a cat)++   "a cat"--   (a cat)1.3   cat.attend(1.3)   nesting multiplies
comfyui  (cat) x1.1   (cat:1.3), which replaces the weights around it   \( \) are literal   [ ] mean nothing

What is no weight in a syntax is text: so are brackets without a partner. A1111 alone gives an opening bracket without
a partner all that follows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lcm_jax.runtime.messages import did_you_mean, shown

UP, DOWN = 1.1, 0.9  # factors of one step of emphasis; A1111's way down is 1 / UP


class Fragment(NamedTuple):
    """A piece of a prompt, and the weight of its tokens."""

    text: str
    weight: float


Sections = tuple[tuple[Fragment, ...], ...]
"""The fragments of a prompt, between its BREAKs: a section begins a chunk of its own."""


def parse(text: str, syntax: str) -> Sections:
    """Return the weighted fragments of a text; ValueError for an unknown syntax, or a weight that is no finite number.

    >>> parse("a (red:1.3) [heart]", "a1111")[0][:2]
    (Fragment(text='a ', weight=1.0), Fragment(text='red', weight=1.3))
    >>> parse("a (red heart)1.3 and a cat++", "compel")[0][1]
    Fragment(text='red heart', weight=1.3)
    >>> parse("(a (red:1.3) heart:2)", "comfyui")[0][1]
    Fragment(text='red', weight=1.3)
    """
    check_syntax(syntax)
    try:
        sections = SYNTAXES[syntax](text)
    except RecursionError:
        raise _too_deep(text) from None
    for fragment in (fragment for section in sections for fragment in section):
        if not math.isfinite(fragment.weight):
            raise ValueError(f"prompt {shown(text, 80)}: the weight of {shown(fragment.text, 60)} is not finite")
    return sections


def check_syntax(syntax: object) -> None:
    """Raise ValueError for a syntax that there is not."""
    if not isinstance(syntax, str) or syntax not in SYNTAXES:
        hint = did_you_mean(str(syntax), SYNTAXES) or f"; known are {', '.join(SYNTAXES)}"
        raise ValueError(f"prompt_syntax {shown(syntax, 80)} is unknown{hint}")


def _too_deep(text: str) -> ValueError:
    return ValueError(f"prompt {shown(text, 80)}: its brackets are nested too deeply")


def _number(text: str, prompt: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"prompt {shown(prompt, 80)}: {shown(text, 40)} is no weight; give a number such as 1.2")
    return number


def _merged(fragments: Sequence[tuple[str, float]], between: str = "") -> tuple[Fragment, ...]:
    """Join neighbours of one weight, with `between` between them."""
    merged: list[Fragment] = []
    for text, weight in fragments:
        if merged and merged[-1].weight == weight:
            merged[-1] = Fragment(merged[-1].text + between + text, weight)
        else:
            merged.append(Fragment(text, weight))
    return tuple(merged)


# A1111: escapes, brackets, a weight with the bracket it closes, and runs of anything else.
_A1111 = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_AND = re.compile(r"\bAND\b")


def _a1111(text: str) -> Sections:
    if _AND.search(text):
        raise ValueError(f"prompt {shown(text, 80)}: AND (several prompts composed) is not supported; write and")
    pieces: list[list[tuple[str, float]]] = [[]]  # by section
    weights: list[float] = []  # of all pieces, in order: brackets reach across BREAK
    round_brackets, square_brackets = [], []  # the number of pieces before each that is open
    texts: list[str | None] = []  # None: BREAK

    def multiply(start: int, factor: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= factor

    for match in _A1111.finditer(text):
        token, weight = match[0], match["weight"]
        if token == "(":
            round_brackets.append(len(texts))
        elif token == "[":
            square_brackets.append(len(texts))
        elif weight is not None and round_brackets:
            multiply(round_brackets.pop(), _number(weight, text))
        elif token == ")" and round_brackets:
            multiply(round_brackets.pop(), UP)
        elif token == "]" and square_brackets:
            multiply(square_brackets.pop(), 1 / UP)
        else:
            literal = len(token) > 1 and token.startswith("\\")
            parts = [token[1:]] if literal else _BREAK.split(token)
            for i, part in enumerate(parts):
                for piece in ([None] if i else []) + [part]:
                    texts.append(piece)
                    weights.append(1.0)
    for start in round_brackets:
        multiply(start, UP)
    for start in square_brackets:
        multiply(start, 1 / UP)
    for piece, factor in zip(texts, weights, strict=True):
        if piece is None:
            pieces.append([])
        else:
            pieces[-1].append((piece, factor))
    return tuple(_merged(section) or (Fragment("", 1.0),) for section in pieces)


_COMFYUI = re.compile(r"\\[()]|[()]|[^\\()]+|\\")


def _comfyui(text: str) -> Sections:
    fragments: list[tuple[str, float]] = []

    def walk(tokens: Sequence[str], weight: float) -> None:
        """Collect the fragments of tokens that stand at one depth; a bracket without an end reaches to the end."""
        depth, inner = 0, []
        for token in tokens:
            if depth == 0:
                if token == "(":
                    depth = 1
                else:
                    fragments.append((token[-1] if token in ("\\(", "\\)") else token, weight))
                continue
            depth += {"(": 1, ")": -1}.get(token, 0)
            if depth:
                inner.append(token)
            else:
                close(inner, weight)
                inner = []
        if depth:
            fragments.append(("(", weight))
            walk(inner, weight)

    def close(inner: list[str], weight: float) -> None:
        factor_here, last = weight * UP, inner[-1] if inner else ""
        before, colon, number = last.rpartition(":")
        if colon and last not in ("(", ")") and (before or len(inner) > 1):
            try:
                factor_here, is_weight = float(number), True
            except ValueError:
                is_weight = False
            if is_weight:
                factor_here = _number(number, text)
                inner = [*inner[:-1], *([before] if before else [])]
        walk(inner, factor_here)

    walk(_COMFYUI.findall(text), 1.0)
    return (_merged(fragments) or (Fragment("", 1.0),),)


_SIGNS = re.compile(r"(\++|-+)(?=$|[\s,.;:!?()\"'])")  # after a word, a bracket or a quote
_FACTOR = re.compile(r"\++|-+|[+-]?(?:\d+\.?\d*|\.\d+)(?![\w.])")
_ATTEND = re.compile(r"\.attend\(([^()]*)\)")
_COMPEL_CALL = re.compile(r"[\w)\"]\.(swap|blend|and)\(")
_WORD = re.compile(r"(?:[^\s()\",\\]|\\.)+")


def _compel(text: str) -> Sections:
    if (call := _COMPEL_CALL.search(text)) is not None:
        raise ValueError(f"prompt {shown(text, 80)}: .{call[1]}() is not supported; of compel, weights are")
    partners = _partners(text)
    fragments: list[tuple[str, float]] = []

    def factor(at: int, *, bracketed: bool) -> tuple[float, int]:
        """Return the factor that is written from `at` on, and where it ends."""
        if (call := _ATTEND.match(text, at)) is not None:
            given = call[1].strip()
            signed = re.fullmatch(r"\++|-+", given) is not None
            return (_signs(given) if signed else _number(given, text)), call.end()
        match = (_FACTOR if bracketed else _SIGNS).match(text, at)
        if match is None:
            return 1.0, at
        signed = match[0].strip("+-") == ""
        return (_signs(match[0]) if signed else _number(match[0], text)), match.end()

    def walk(at: int, end: int, weight: float) -> None:
        while at < end:
            if at in partners:
                close = partners[at]
                factor_here, after = factor(close + 1, bracketed=True)
                if text[at] == '"' and factor_here == 1.0 and after == close + 1:
                    fragments.append(('"', weight))
                    walk(at + 1, close, weight)
                    fragments.append(('"', weight))
                else:
                    walk(at + 1, close, weight * factor_here)
                at = after
            elif (word := _WORD.match(text, at, end)) is not None:
                base = re.match(r"(?:\\.|[^\\])*?(?=(?:\++|-+)?$)", word[0])
                call = _ATTEND.search(text, at, end)
                stop = at + len(base[0]) if base is not None and base[0] else word.end()
                if (
                    call is not None
                    and at < call.start()
                    and text[at : call.start()] == word[0].partition(".attend")[0]
                ):
                    stop = call.start()
                factor_here, after = factor(stop, bracketed=False)
                if after == stop:
                    stop = after = word.end()
                fragments.append((re.sub(r"\\(.)", r"\1", text[at:stop]), weight * factor_here))
                at = after
            else:
                if not text[at].isspace():
                    fragments.append((text[at], weight))
                at += 1

    walk(0, len(text), 1.0)
    return (_merged(fragments, " ") or (Fragment("", 1.0),),)


def _signs(signs: str) -> float:
    return float((UP if signs[0] == "+" else DOWN) ** len(signs))


def _partners(text: str) -> Mapping[int, int]:
    """Return opening -> closing position of the brackets and quotes that have a partner, passing over escapes."""
    partners, stack, at = {}, [], 0
    while at < len(text):
        letter = text[at]
        if letter == "\\":
            at += 1
        elif letter == "(":
            stack.append(at)
        elif letter == ")" and stack and text[stack[-1]] == "(":
            partners[stack.pop()] = at
        elif letter == '"':
            quotes = [i for i in stack if text[i] == '"']
            if quotes:
                del stack[stack.index(quotes[-1]) + 1 :]  # brackets that a quote cuts are text
                partners[stack.pop()] = at
            else:
                stack.append(at)
        at += 1
    return partners


SYNTAXES: Mapping[str, Callable[[str], Sections]] = {"a1111": _a1111, "compel": _compel, "comfyui": _comfyui}


def texts_by_step(text: str, syntax: str | None, steps: int) -> list[str]:
    """Return the text of each of a number of steps: one and the same, unless it has A1111's schedules.

    [a:b:when] is a in the first `when` steps and b afterwards; [b:when] and [a::when] leave one of the two out. With a
    point, `when` is a share of the steps. [a|b|c] takes turns. ValueError for a time that is not finite.

    >>> texts_by_step("a [cat:dog:0.5]", "a1111", 4)
    ['a cat', 'a cat', 'a dog', 'a dog']
    >>> texts_by_step("a [cat|dog]", "a1111", 3)
    ['a cat', 'a dog', 'a cat']
    """
    if syntax != "a1111" or "[" not in text:
        return [text] * steps
    try:
        tree = _schedule(text)
    except RecursionError:
        raise _too_deep(text) from None
    return ["".join(_at_step(node, step, steps) for node in tree) for step in range(1, steps + 1)]


def is_scheduled(text: str, syntax: str | None) -> bool:
    """Return whether a text changes with the step."""
    if syntax != "a1111" or "[" not in text:
        return False
    try:
        return any(not isinstance(node, str) for node in _schedule(text))
    except RecursionError:
        raise _too_deep(text) from None


class _Switch(NamedTuple):
    before: list[_Node]
    after: list[_Node]
    when: str


class _Turns(NamedTuple):
    options: list[list[_Node]]


_Node = str | _Switch | _Turns
_TIME = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


def _at_step(node: _Node, step: int, steps: int) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, _Turns):
        chosen = node.options[(step - 1) % len(node.options)]
    else:
        time = float(node.when) * (steps if "." in node.when else 1)
        chosen = node.before if step <= int(time) else node.after
    return "".join(_at_step(inner, step, steps) for inner in chosen)


def _schedule(text: str) -> list[_Node]:
    """Return a text as plain strings and the schedules between them; brackets of emphasis stay in the strings."""
    brackets, stack = {}, []
    at = 0
    while at < len(text):
        letter = text[at]
        if letter == "\\":
            at += 1
        elif letter in "([":
            stack.append(at)
        elif letter in ")]" and stack and text[stack[-1]] == {")": "(", "]": "["}[letter]:
            brackets[stack.pop()] = at
        at += 1

    def nodes(at: int, end: int) -> list[_Node]:
        found: list[_Node] = []
        while at < end:
            if at not in brackets:
                length = 2 if text[at] == "\\" else 1
                found.append(text[at : min(at + length, end)])
                at += length
                continue
            close = brackets[at]
            special = one(at + 1, close) if text[at] == "[" else None
            found += [text[at], *nodes(at + 1, close), text[close]] if special is None else [special]
            at = close + 1
        return _joined(found)

    def one(start: int, end: int) -> _Node | None:
        """Return the schedule that stands between two square brackets; None if it is emphasis."""
        cuts, at = [], start
        while at < end:
            if text[at] in ":|":
                cuts.append(at)
            at = brackets[at] + 1 if at in brackets else at + (2 if text[at] == "\\" else 1)

        def between(sign: str) -> list[tuple[int, int]]:
            at = [cut for cut in cuts if text[cut] == sign]
            return list(zip([start, *(cut + 1 for cut in at)], [*at, end], strict=True))

        parts = between(":")
        time = _TIME.fullmatch(text[slice(*parts[-1])])
        if len(parts) == 1 and cuts:
            return _Turns([nodes(*part) for part in between("|")])
        if len(parts) not in (2, 3) or time is None:
            return None
        if not math.isfinite(float(time[1])):
            raise ValueError(f"prompt {shown(text, 80)}: the time {shown(time[1], 40)} is not finite")
        return _Switch(nodes(*parts[0]) if len(parts) == 3 else [], nodes(*parts[-2]), time[1])

    return nodes(0, len(text))


def _joined(nodes: Sequence[_Node]) -> list[_Node]:
    joined: list[_Node] = []
    for node in nodes:
        if joined and isinstance(node, str) and isinstance(joined[-1], str):
            joined[-1] += node
        else:
            joined.append(node)
    return joined
