"""The geometric diffusion bridge. Its system is not in this release yet."""
