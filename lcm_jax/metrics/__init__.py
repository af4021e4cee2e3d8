"""Scores of generated pictures: distances between sets of features, and between pictures.

The features come from any `FeatureExtractor`, so each score can be taken with any network.
"""

from lcm_jax.metrics.bootstrap import Interval, bootstrap
from lcm_jax.metrics.clip_score import clip_score, clip_scores
from lcm_jax.metrics.clip_towers import ClipTowers
from lcm_jax.metrics.fd_dinov2 import dinov2_features
from lcm_jax.metrics.feature_kinds import load_features
from lcm_jax.metrics.features import FeatureExtractor, NetworkFeatures
from lcm_jax.metrics.frechet import Moments, frechet_distance, frechet_infinity, gaussian_distance
from lcm_jax.metrics.inception import InceptionV3, inception_features, load_inception
from lcm_jax.metrics.mmd import cmmd, kid
from lcm_jax.metrics.precision_recall import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from lcm_jax.metrics.preference import Preference, preference_scores
from lcm_jax.metrics.ranking import pareto_ranks, ranks, spearman
from lcm_jax.metrics.reconstruction import psnr, ssim
from lcm_jax.metrics.report import report
from vae16.perceptual import LPIPS

__all__ = [
    "LPIPS",
    "ClipTowers",
    "DensityCoverage",
    "FeatureExtractor",
    "InceptionV3",
    "Interval",
    "Moments",
    "NetworkFeatures",
    "PrecisionRecall",
    "Preference",
    "bootstrap",
    "clip_score",
    "clip_scores",
    "cmmd",
    "density_coverage",
    "dinov2_features",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_distance",
    "inception_features",
    "kid",
    "load_features",
    "load_inception",
    "pareto_ranks",
    "precision_recall",
    "preference_scores",
    "psnr",
    "ranks",
    "report",
    "spearman",
    "ssim",
]
