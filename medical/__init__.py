"""BUSGen and TAILOR on diffusion/. Their systems are not in this release yet."""
