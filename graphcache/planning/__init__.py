"""From a model to a plan: sampling, profiling, search, tuning, comparison."""
