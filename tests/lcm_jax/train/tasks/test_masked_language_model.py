"""A T5 encoder trained for two tiny steps on captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.masked_language_model import MaskedTask
from lcm_jax.weights.diffusers_folder import load_component
from mmdit.text import T5Config, Tokenizer


def test_t5_on_captions(data: DataConfig, train: Callable[[object, Path], Path], tmp_path: Path) -> None:
    net = T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    export = train(MaskedTask(net=net, vocabulary=60, tokens=10, data=data, validation=data), tmp_path)
    t5, tokenizer = load_component(export, "text_encoder_3"), Tokenizer.load(export / "tokenizer_3")
    assert t5.module.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.max_length == 10
