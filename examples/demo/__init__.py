"""Digits sampled with and without feature caching: time, quality and memory, side by side."""
