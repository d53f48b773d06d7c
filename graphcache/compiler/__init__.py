"""From a capture and a plan to compiled phases, and the watch over what was captured."""
