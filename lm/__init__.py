"""Language models: AlphaDecay, masked diffusion, RELAY, precision. Not in this release yet."""
