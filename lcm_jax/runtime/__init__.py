"""Helpers that every package uses: compiler options, caches, hardware figures, FLOPs, atomic files, image files."""
