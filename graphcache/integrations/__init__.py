"""graphcache in programs that run pipelines of their own; none of them is needed to import it."""
