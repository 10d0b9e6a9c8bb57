"""How many clips a chip can take: a few compilations, chosen one after the other."""

from collections.abc import Callable

MOST_BATCHES = 3


def search(fits: Callable[[int, str], bool], first: int) -> tuple[int, str] | None:
    """The best (rows a chip, remat) of at most four that are tried; None when the first does not fit.

    Doubles the rows while they fit with every block recomputed; then asks whether as many fit without, which saves a
    quarter of the arithmetic. Where not even the first fit, the layers in the blocks are recomputed, too.
    """
    best, rows = None, first
    for _ in range(MOST_BATCHES):
        if not fits(rows, "block"):
            break
        best, rows = (rows, "block"), 2 * rows
    if best is None:
        return (first, "full") if fits(first, "full") else None
    return (best[0], "none") if fits(best[0], "none") else best
