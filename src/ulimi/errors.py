"""The one exception for mistakes of a user: bad input, bad settings, a file that cannot be read.

The command line turns it into one line on standard error and exit status 2. Mistakes of ours are
`assert`s and ordinary exceptions, and those keep their tracebacks.
"""

import difflib
from collections.abc import Iterable


class UlimiError(ValueError):
    """Something that was given cannot be used; the message says what it was and what is allowed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known name a mistyped one comes closest to, as a clause to append, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def install(extra: str) -> str:
    """Say how one of the package's extras is installed."""
    return f"pip install 'ulimi[{extra}]', or '.[{extra}]' in a checkout"
