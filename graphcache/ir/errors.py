"""What graphcache raises: every error says what is wrong, where, and what to do."""


class GraphCacheError(Exception):
    """The base of every error that graphcache raises on purpose."""


class PlanError(GraphCacheError):
    """A plan that cannot be read, is not legal, or does not fit the model."""


class CaptureError(GraphCacheError):
    """A model or call that a functional graph cannot hold."""


class StateError(GraphCacheError):
    """A call that does not fit the generation in progress."""


class PromiseWarning(UserWarning):
    """A generation did not keep what its plan promises, or could not be compared with it."""
