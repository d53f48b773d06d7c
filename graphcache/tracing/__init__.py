"""From a model and a call to a graph: one evaluation, traced with the model left as it was."""
