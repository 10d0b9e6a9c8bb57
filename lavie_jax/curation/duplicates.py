"""Near-duplicates: clips that show the same, perhaps at another size, rate or compression."""

import dataclasses

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

MOMENTS = 4  # of a clip, each with a difference hash of 64 bits
HASH_BITS = MOMENTS * 64
COLOURS = 32  # of 255; how far a square's mean colour may be off


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What two showings of the same have in common, as hex digits.

    Attributes:
      bits: a difference hash of four moments: for 8x8 places, whether it gets brighter to the right.
      colours: the mean colours of 8x8 squares in the middle of the clip. They tell apart what is flat, where a
        difference hash has little to go by.
    """

    bits: str
    colours: str


def fingerprint(frames: UInt8[np.ndarray, "t h w 3"]) -> Fingerprint:
    """The fingerprint of samples that are spread over a clip."""
    places = np.round(np.linspace(0, len(frames) - 1, MOMENTS)).astype(int)
    slopes = [np.diff(_small(frames[i], 9, 8).astype(int).sum(-1), axis=1) > 6 for i in places]
    colours = _small(frames[len(frames) // 2], 8, 8)
    return Fingerprint(np.packbits(np.stack(slopes)).tobytes().hex(), colours.tobytes().hex())


def _small(frame: UInt8[np.ndarray, "h w 3"], width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BOX))


class Index:
    """The fingerprints so far, found again by what is near.

    Two hashes that differ in at most k bits agree in at least one of k + 1 parts: a clip is compared with those alone
    that share a part with it, and none that is near is missed.
    """

    def __init__(self, max_bits: int):
        self.max_bits = max_bits
        self.parts = np.array_split(np.arange(HASH_BITS), max_bits + 1)
        self.bits: list[np.ndarray] = []
        self.colours: list[np.ndarray] = []
        self.known: dict[tuple[int, bytes], list[int]] = {}

    def find_or_add(self, new: Fingerprint) -> int | None:
        """The place, from 0, of the first that is nearly the same; without one, the new one is added and None."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(new.bits), np.uint8))
        squares = np.frombuffer(bytes.fromhex(new.colours), np.uint8)
        colours = rearrange(squares, "(hw c) -> hw c", c=3).astype(int)
        keys = [(i, bits[part].tobytes()) for i, part in enumerate(self.parts)]
        for place in sorted({place for key in keys for place in self.known.get(key, ())}):
            far = np.abs(self.colours[place] - colours).max() > COLOURS
            if not far and (self.bits[place] != bits).sum() <= self.max_bits:
                return place
        for key in keys:
            self.known.setdefault(key, []).append(len(self.bits))
        self.bits.append(bits)
        self.colours.append(colours)
        return None
