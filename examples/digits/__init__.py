"""A small class-conditional diffusion transformer for handwritten digits, trained on a CPU."""
