"""Geometric states and the bridges between them (Luo et al., arXiv:2410.24220)."""
