"""Real time: the stream batch, residual guidance, the similarity filter, and what feeds and shows a stream."""

from lcm_jax.stream.controls import Controls
from lcm_jax.stream.similarity import SimilarityFilter, similarity
from lcm_jax.stream.step import Settings, State, StreamProgram, Weights
from lcm_jax.stream.stream import Stream

__all__ = ["Controls", "Settings", "SimilarityFilter", "State", "Stream", "StreamProgram", "Weights", "similarity"]
