"""Masked diffusion of tokens: processes, objectives and samplers."""
