"""A small class-conditional video diffusion transformer for moving handwritten digits, trained on a CPU."""
