"""A disk that is full ends no run: what could not be written is reported and tried again at the next interval."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator

from absl import logging


@contextlib.contextmanager
def outlive(what: str) -> Iterator["Written"]:
    """Around the writing of something that the next interval writes again: a full disk is reported, not raised.

    What it gives is true afterwards if nothing was in the way.
    """
    written = Written()
    try:
        yield written
        written.whole = True
    except Exception as error:
        if not is_full(error):
            raise
        logging.error("%s could not be written: the disk is full. Training goes on.", what)


@dataclasses.dataclass
class Written:
    """Whether something was written."""

    whole: bool = False

    def __bool__(self) -> bool:
        return self.whole


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that there is no room to write."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):  # tensorstore's
            return True
        error = error.__cause__ or error.__context__
    return False
