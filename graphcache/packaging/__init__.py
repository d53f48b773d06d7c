"""Models compiled ahead of time, as files: written where the model is, run without its source."""
