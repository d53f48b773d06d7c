"""Where the command line writes: plain text, in which nothing of a user's or a file's becomes markup."""

from rich.console import Console

console = Console(markup=False, emoji=False, highlight=False)
