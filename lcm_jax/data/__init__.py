"""Data: sources of captioned pictures, loaders that make batches of them, and caches of arrays computed once."""

from lcm_jax.data.array_cache import Cache, Columns, cached, open_cache, write_cache
from lcm_jax.data.buckets import bucket_sizes
from lcm_jax.data.loader import Batch, BucketLoader, Loader, LoaderIterator
from lcm_jax.data.mixing import CaptionMix
from lcm_jax.data.records import InMemory, Record, Source
from lcm_jax.data.sources import has_split, load_buckets, load_source, register

__all__ = [
    "Batch",
    "BucketLoader",
    "Cache",
    "CaptionMix",
    "Columns",
    "InMemory",
    "Loader",
    "LoaderIterator",
    "Record",
    "Source",
    "bucket_sizes",
    "cached",
    "has_split",
    "load_buckets",
    "load_source",
    "open_cache",
    "register",
    "write_cache",
]
