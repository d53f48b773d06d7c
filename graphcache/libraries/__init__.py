"""Dealings with other libraries: optional ones, PyTorch's log, kernels and the lock around its tracing."""
