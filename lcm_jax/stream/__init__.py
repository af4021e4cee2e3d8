"""Real-time sampling (StreamDiffusion, 2312.12491): the stream batch, residual classifier-free guidance (RCFG), the
stochastic similarity filter, and the readers and writers of frames.
"""

from lcm_jax.stream.controls import Controls
from lcm_jax.stream.similarity import SimilarityFilter, similarity
from lcm_jax.stream.step import Settings, State, StreamProgram, Weights
from lcm_jax.stream.stream import Stream

__all__ = ["Controls", "Settings", "SimilarityFilter", "State", "Stream", "StreamProgram", "Weights", "similarity"]
