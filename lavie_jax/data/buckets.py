"""Buckets: a few sizes of frames that batches may have, so that clips keep their shape and few programs are compiled.

Every global batch is of one bucket. Which one is a function of the step, and which clip a function of the step and the
place in the batch, so the position in the data is still one integer, and any number of processes finds the same.
"""

from collections.abc import Sequence

from lavie_jax.errors import UserError

Size = tuple[int, int]  # (height, width)
ALIKE = 0.95  # buckets that keep nearly as much of a picture as the best one does


def size_name(size: Size) -> str:
    """ "320x512" of (320, 512)."""
    return f"{size[0]}x{size[1]}"


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """The number of the bucket that a picture belongs to.

    The one that keeps most of it when it is scaled until the bucket just fits inside and the rest is cut off. Of those
    that keep nearly as much, the largest that it fills without being scaled up, else the smallest.
    """
    rows, columns = size
    scales = [max(height / rows, width / columns) for height, width in buckets]
    kept = [height * width / (rows * columns * scale**2) for scale, (height, width) in zip(scales, buckets)]
    alike = [i for i, share in enumerate(kept) if share >= ALIKE * max(kept)]
    filled = [i for i in alike if scales[i] <= 1]
    area = {i: buckets[i][0] * buckets[i][1] for i in alike}
    return max(filled, key=area.__getitem__) if filled else min(alike, key=area.__getitem__)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """((320, 512), (512, 320)) of "320x512,512x320"."""
    try:
        sizes = tuple(tuple(int(side) for side in size.split("x")) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(len(size) != 2 for size in sizes):
        raise UserError(f"sizes are HEIGHTxWIDTH, such as 320x512,512x320; given {text!r}")
    return sizes
