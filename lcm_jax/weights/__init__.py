"""Weights in and out: the rule-table engine, and the files that hold tensors and configs."""
