"""A small text-to-image diffusion transformer for emoji, with its training."""
