"""What one thread does at a time."""

import threading

COMPILING = threading.RLock()
"""Tracing and compiling change PyTorch's global state."""
