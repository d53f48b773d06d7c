"""Where the command line writes: plain text, in which nothing of a user's or a file's becomes markup."""

import sys

from rich.console import Console

console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
"""What goes to a file or another program is wide enough for tables to lose nothing."""
