"""Dealings with other libraries: optional ones, PyTorch's log and kernels, and what one thread does at once."""
