"""Measures of a model's quality: scores on held-out pictures, and studies that train a grid of variants."""
