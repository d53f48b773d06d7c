"""What one thread does at a time."""

import gc
import threading

_PATIENT = (50_000, 20, 20)
"""Objects that may be made before Python looks for garbage. By its own thresholds it looks through all of
PyTorch again and again while a graph is made, which takes a quarter of the time of a capture.
"""


class _Exclusive:
    """A lock that its owner may take again; meanwhile less is looked for garbage."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._before = gc.get_threshold()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        if self._depth == 1:
            self._before = gc.get_threshold()
            if self._before[0]:  # 0 switches it off
                first, second, third = map(max, self._before, _PATIENT)
                gc.set_threshold(first, second, third)

    def __exit__(self, *_: object) -> None:
        if self._depth == 1:
            gc.set_threshold(*self._before)
        self._depth -= 1
        self._lock.release()


COMPILING = _Exclusive()
"""Tracing and compiling change PyTorch's global state."""
