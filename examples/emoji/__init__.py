"""A small text-to-image diffusion transformer for emoji, trained on a CPU."""
