"""One HTML page about a profile and the plans made from it."""

from graphcache.page.exports import save_charts
from graphcache.page.page import write_page

__all__ = ["save_charts", "write_page"]
