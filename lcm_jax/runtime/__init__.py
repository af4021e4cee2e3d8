"""What everything stands on: compiler options, caches, hardware figures, FLOPs, atomic files, image files."""
