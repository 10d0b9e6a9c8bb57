"""Near-duplicates: clips that show the same thing, possibly at another size, rate or compression."""

import dataclasses

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

MOMENTS = 4  # frames of a clip, each with a difference hash of 64 bits
HASH_BITS = MOMENTS * 64
MAX_COLOUR_DIFFERENCE = 32  # of 255, between the mean colours of corresponding squares


@dataclasses.dataclass(frozen=True)
class PerceptualHash:
    """A compact description of a clip that survives scaling and compression, as hex digits.

    Attributes:
        bits: difference hashes of four frames: whether each of 8x8 positions is darker than its right neighbour.
        colours: mean colours of 8x8 squares in the middle frame. They distinguish flat pictures, for which a
            difference hash carries little information.
    """

    bits: str
    colours: str


def perceptual_hash(frames: UInt8[np.ndarray, "t h w 3"]) -> PerceptualHash:
    """Returns the hash of a clip, from sample frames spread over it."""
    chosen = np.round(np.linspace(0, len(frames) - 1, MOMENTS)).astype(int)
    slopes = [np.diff(_resize(frames[i], 9, 8).astype(int).sum(-1), axis=1) > 6 for i in chosen]
    colours = _resize(frames[len(frames) // 2], 8, 8)
    return PerceptualHash(np.packbits(np.stack(slopes)).tobytes().hex(), colours.tobytes().hex())


def _resize(frame: UInt8[np.ndarray, "h w 3"], width: int, height: int) -> UInt8[np.ndarray, "rows columns 3"]:
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BOX))


class HashIndex:
    """An index that finds similar hashes without comparing all of them.

    Two hashes that differ in at most k bits agree in at least one of k + 1 parts (pigeonhole principle). A clip is
    therefore compared only with clips that share a part, and no near-duplicate is missed.
    """

    def __init__(self, max_bits: int):
        self.max_bits = max_bits
        self.parts = np.array_split(np.arange(HASH_BITS), max_bits + 1)
        self.bits: list[np.ndarray] = []
        self.colours: list[np.ndarray] = []
        self.positions: dict[tuple[int, bytes], list[int]] = {}  # (part, its bits) -> positions of clips

    def find_or_add(self, new: PerceptualHash) -> int | None:
        """Returns the position of the first near-duplicate, counted from 0; adds the hash and returns None if none."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(new.bits), np.uint8))
        squares = np.frombuffer(bytes.fromhex(new.colours), np.uint8)
        colours = rearrange(squares, "(hw c) -> hw c", c=3).astype(int)
        keys = [(i, bits[part].tobytes()) for i, part in enumerate(self.parts)]
        for position in sorted({position for key in keys for position in self.positions.get(key, ())}):
            far = np.abs(self.colours[position] - colours).max() > MAX_COLOUR_DIFFERENCE
            if not far and (self.bits[position] != bits).sum() <= self.max_bits:
                return position
        for key in keys:
            self.positions.setdefault(key, []).append(len(self.bits))
        self.bits.append(bits)
        self.colours.append(colours)
        return None
