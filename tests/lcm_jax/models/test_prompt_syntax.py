"""The prompt syntax of A1111, compel and ComfyUI: tables of texts with their fragments, and what is refused."""

from __future__ import annotations

import pytest

from lcm_jax.models.prompt_syntax import is_scheduled, parse, texts_by_step

UP, DOWN = 1.1, 1 / 1.1


def rounded(text: str, syntax: str) -> list[list[tuple[str, float]]]:
    return [[(fragment.text, round(fragment.weight, 6)) for fragment in section] for section in parse(text, syntax)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", UP), (" word", 1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 0.5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:+.5)", [("a", 0.5)]),
        ("[a]", [("a", DOWN)]),
        ("[[a]]", [("a", DOWN**2)]),
        ("((a) b)", [("a", UP**2), (" b", UP)]),
        ("(a [b:1.2])", [("a ", UP), ("b:1.2", UP * DOWN)]),  # a weight is for round brackets
        ("(a:b)", [("a:b", UP)]),
        ("a: b", [("a: b", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        (r"a \\ b", [("a \\ b", 1)]),
        ("(unbalanced", [("unbalanced", UP)]),
        ("a [unbalanced (b", [("a ", 1), ("unbalanced ", DOWN), ("b", DOWN * UP)]),
        ("a) b]", [("a) b]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", UP), ("on", 1), (" a ", UP), ("hill", 0.55), (", sun, ", UP),
             ("sky", UP**4), (".", UP)],
        ),
    ],
)  # fmt: skip
def test_a1111(text: str, want: list[tuple[str, float]]) -> None:
    assert rounded(text, "a1111") == [[(part, round(weight, 6)) for part, weight in want]]


def test_break_begins_a_section_and_brackets_reach_across_it() -> None:
    assert rounded("a BREAK b", "a1111") == [[("a", 1)], [("b", 1)]]
    assert rounded("(a BREAK b:1.2)", "a1111") == [[("a", 1.2)], [("b", 1.2)]]
    assert rounded("a BREAK BREAK b", "a1111") == [[("a", 1)], [("", 1)], [("b", 1)]]
    assert rounded("BREAKFAST", "a1111") == [[("BREAKFAST", 1)]]
    assert rounded("a BREAK b", "compel") == [[("a BREAK b", 1)]]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", [("", 1)]),
        ("fire (flames)", [("fire flames", 1)]),
        ("cat hot-dog eating", [("cat hot-dog eating", 1)]),
        ("(flames)0.5", [("flames", 0.5)]),
        ("(fire flames).attend(0.5)", [("fire flames", 0.5)]),
        ("flames.attend(+)", [("flames", UP)]),
        ('"flames".attend(0.5)', [("flames", 0.5)]),
        ('"pretty flowers"+', [("pretty flowers", UP)]),
        ("flames++", [("flames", UP**2)]),
        ("(flowers)--- flames+++", [("flowers", 0.9**3), ("flames", UP**3)]),
        ("(pretty flowers)+, too hot", [("pretty flowers", UP), (", too hot", 1)]),
        ("flowers fire-- flames", [("flowers", 1), ("fire", 0.81), ("flames", 1)]),
        ("fire (flames (trees)1.5)2.0", [("fire", 1), ("flames", 2), ("trees", 3)]),
        ("hamburger ((bun))", [("hamburger bun", 1)]),
        ("a badly formed +test prompt", [("a badly formed +test prompt", 1)]),
        ("a badly (formed test", [("a badly ( formed test", 1)]),
        ("((a (ba)dly (f)ormed +test )prompt", [("( a ba dly f ormed +test prompt", 1)]),
        (r"mountain \(man\)", [("mountain (man)", 1)]),
        (r"mountain (\(man\))+", [("mountain", 1), ("(man)", UP)]),
        ("(cat)2nd", [("cat 2nd", 1)]),
    ],
)
def test_compel(text: str, want: list[tuple[str, float]]) -> None:
    assert rounded(text, "compel") == [[(part, round(weight, 6)) for part, weight in want]]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a (b) c", [("a ", 1), ("b", UP), (" c", 1)]),
        ("((b))", [("b", UP**2)]),
        ("(a (b:1.3) c:2)", [("a ", 2), ("b", 1.3), (" c", 2)]),  # an explicit weight replaces those around it
        ("(a:b)", [("a:b", UP)]),
        ("[a] b", [("[a] b", 1)]),
        (r"\(a\) (b", [("(a) (b", 1)]),
        ("(:2)", [(":2", UP)]),
    ],
)
def test_comfyui(text: str, want: list[tuple[str, float]]) -> None:
    assert rounded(text, "comfyui") == [[(part, round(weight, 6)) for part, weight in want]]


@pytest.mark.parametrize(
    ("syntax", "text", "message"),
    [
        ("a1111", "(cat:1.2.3)", r"prompt '\(cat:1.2.3\)': '1.2.3' is no weight"),
        ("a1111", f"(cat:{'9' * 400})", "is no weight"),
        ("a1111", "((cat:" + "9" * 200 + "):" + "9" * 200 + ")", "the weight of 'cat' is not finite"),
        ("a1111", "a cat AND a dog", "AND .* is not supported"),
        ("compel", f"(cat){'9' * 400}", "is no weight"),
        ("compel", "cat.attend(much)", "'much' is no weight"),
        ("compel", '("a", "b").blend(1, 2)', r"\.blend\(\) is not supported"),
        ("compel", "a cat.swap(dog)", r"\.swap\(\) is not supported"),
        ("comfyui", "(cat:inf)", "'inf' is no weight"),
        ("comfyui", "(cat:nan)", "'nan' is no weight"),
        ("a111", "cat", "prompt_syntax 'a111' is unknown; did you mean a1111"),
    ],
)
def test_what_does_not_parse_is_one_line(syntax: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(text, syntax)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [b::4]", [(4, "a b"), (10, "a ")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:c:1.0]", [(10, "a b")]),
        ("a [b:c:99]", [(10, "a b")]),
        ("a [b:c:0]", [(10, "a c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        (r"\[a:b:3]", [(10, r"\[a:b:3]")]),
        ("[a:b:c]", [(10, "[a:b:c]")]),
    ],
)
def test_schedules_of_a1111(text: str, want: list[tuple[int, str]]) -> None:
    steps = texts_by_step(text, "a1111", 10)
    ends = [(i + 1, now) for i, now in enumerate(steps) if i == 9 or steps[i + 1] != now]
    assert ends == want
    assert is_scheduled(text, "a1111") == (len(want) > 1 or want[0][1] != text)


@pytest.mark.parametrize("syntax", ["a1111", "compel", "comfyui"])
def test_brackets_in_thousands_are_one_line(syntax: str) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|is not finite"):
        parse("(" * 9000 + "cat" + ")" * 9000, syntax)
    for of_steps in (lambda text: texts_by_step(text, "a1111", 2), lambda text: is_scheduled(text, "a1111")):
        with pytest.raises(ValueError, match="nested too deeply"):
            of_steps("[" * 3000 + "cat" + "]" * 3000)


def test_alternatives_take_turns() -> None:
    assert texts_by_step("[a|(b:1.1)|]x", "a1111", 4) == ["ax", "(b:1.1)x", "x", "ax"]
    assert texts_by_step("[a|b]", "compel", 2) == ["[a|b]"] * 2
    assert texts_by_step("[a|b]", None, 1) == ["[a|b]"]
    with pytest.raises(ValueError, match="the time '1e999' is not finite"):
        texts_by_step("[a:b:1e999]", "a1111", 4)
