"""Neural quantum states for the doped two-dimensional Hubbard model (arXiv:2507.02644)."""
