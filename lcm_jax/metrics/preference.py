"""Scores of human preference by a CLIP that was trained on people's choices: PickScore and HPSv2.

ImageReward (Xu et al. 2023, 2304.05977) is none of them: it reads the text and the picture together, with BLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

from lcm_jax.metrics.clip_score import cosines
from lcm_jax.metrics.clip_towers import ClipTowers, Fit, image_features
from lcm_jax.metrics.features import NetworkFeatures
from lcm_jax.runtime.messages import did_you_mean

TITLES: Mapping[str, str] = {"pickscore": "PickScore", "hpsv2": "HPSv2"}
FIT: Mapping[str, Fit] = {"pickscore": "crop", "hpsv2": "pad"}


def preference_scores(
    image_embeds: Float[np.ndarray, "n d"], text_embeds: Float[np.ndarray, "n d"], *, scale: float = 1.0
) -> Float[np.ndarray, " n"]:
    """Return the score of each pair of a picture and its text, scale * cos(image_i, text_i).

    The embeddings are those of a CLIP that was trained on preferences. PickScore (Kirstain et al. 2023, 2305.01569,
    eq. 1) has the scale exp(logit_scale) of the network, about 100; HPSv2 (Wu et al. 2023, 2306.09341) has 1. The
    embeddings need not be normalised. Of two pictures of a text the one with the higher score is the one that people
    would choose, by a softmax over the scores (HPSv2: over 100 times the scores).

    Raises ValueError as `clip_scores` does.

    >>> import numpy as np
    >>> from lcm_jax.metrics import preference_scores
    >>> images, texts = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[5.0, 0.0], [4.0, -3.0]])
    >>> preference_scores(images, texts, scale=100.0).round(1).tolist()
    [100.0, -60.0]
    """
    return scale * cosines(image_embeds, text_embeds)


@dataclass(frozen=True, kw_only=True, eq=False)
class Preference:
    """A preference score, `preference_scores` of a CLIP's embeddings: (pictures, texts) -> (n,) numbers.

    >>> from lcm_jax.metrics import ClipTowers, Preference
    >>> score = Preference(kind="hpsv2", towers=ClipTowers.load("openmoji"))  # the CLIP of your own
    >>> score(np.zeros((2, 32, 32, 3), np.uint8), ["red heart", "cat face"]).shape
    (2,)
    """

    kind: str  # "pickscore" or "hpsv2"
    towers: ClipTowers

    @classmethod
    def load(cls, text: str, *, option: str = "preference") -> Preference:
        """Load "KIND:PATH", such as pickscore:FOLDER or hpsv2:FILE; the paths are those of `ClipTowers.load`.

        Without a kind a CLIPModel of transformers is a PickScore, and a file with OpenCLIP's names HPSv2. option: named
        in errors. Raises ValueError for a PickScore without logit_scale, and as `ClipTowers.load` does.
        """
        kind, colon, path = text.partition(":")
        if colon and kind not in TITLES:
            known = ", ".join(TITLES)
            raise ValueError(f"{option} {text}: {kind} is unknown; give {known}{did_you_mean(kind, TITLES)}")
        if not colon:
            kind, path = "", text
        towers = ClipTowers.load(path)
        kind = kind or ("hpsv2" if towers.is_open_clip else "pickscore")
        towers = replace(towers, images=image_features(towers.vision, FIT[kind]))
        if kind == "pickscore" and towers.scale is None:
            raise ValueError(f"{option} {text}: it has no logit_scale, which PickScore needs; give its CLIPModel")
        return cls(kind=kind, towers=towers)

    @property
    def title(self) -> str:
        """The name in papers, such as PickScore."""
        return TITLES[self.kind]

    def shard(self, split: Callable[[NetworkFeatures], NetworkFeatures]) -> Preference:
        """Return the same score with `split` of the image encoder, such as an extractor over the devices of a mesh."""
        return replace(self, towers=replace(self.towers, images=split(self.towers.images)))

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return the score of each picture for its text."""
        scale = self.towers.scale if self.kind == "pickscore" else None
        embeds = self.towers.embed_images(images), self.towers.embed_texts(texts)
        return preference_scores(*embeds, scale=1.0 if scale is None else scale)
