"""Diffusion models and their optimal loss (Xu et al., arXiv:2506.13763)."""
