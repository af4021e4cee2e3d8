"""How good a model is: scores on held-out pictures, and studies that are grids of trainings."""
