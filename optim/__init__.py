"""Gradient transformations for Optax, and nothing else."""
