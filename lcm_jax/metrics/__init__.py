"""Scores of generated pictures: distances between sets of features, and between pictures.

The features come from any `FeatureExtractor`, so each score can be taken with any network.
"""

from lcm_jax.metrics.clip_score import clip_score, clip_scores
from lcm_jax.metrics.features import FeatureExtractor, NetworkFeatures
from lcm_jax.metrics.frechet import Moments, frechet_distance, gaussian_distance
from lcm_jax.metrics.inception import InceptionV3, inception_features, load_inception
from lcm_jax.metrics.precision_recall import PrecisionRecall, precision_recall
from lcm_jax.metrics.ranking import pareto_ranks, ranks, spearman
from lcm_jax.metrics.reconstruction import psnr, ssim
from lcm_jax.metrics.report import report
from vae16.perceptual import LPIPS

__all__ = [
    "LPIPS",
    "FeatureExtractor",
    "InceptionV3",
    "Moments",
    "NetworkFeatures",
    "PrecisionRecall",
    "clip_score",
    "clip_scores",
    "frechet_distance",
    "gaussian_distance",
    "inception_features",
    "load_inception",
    "pareto_ranks",
    "precision_recall",
    "psnr",
    "ranks",
    "report",
    "spearman",
    "ssim",
]
