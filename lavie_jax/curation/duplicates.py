"""Near-duplicates: clips that show the same thing, possibly at another size, rate or compression.

Of near-duplicates the first is kept: a clip is dropped if and only if an earlier one that is kept is near it. Being
near is not transitive: of A, B and C, where B is near both others and they are not near each other, A and C are kept.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Int64, UInt8, UInt64
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


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """The hashes of many clips, as arrays.

    Attributes:
        ids: numbers that increase in the order of the clips: the first of near-duplicates is kept.
        bits: the 256 bits of each hash, in words.
        colours: mean colours of 64 squares.
    """

    ids: Int64[np.ndarray, " n"]
    bits: UInt64[np.ndarray, "n 4"]
    colours: UInt8[np.ndarray, "n 192"]

    @classmethod
    def of(cls, ids: Sequence[int], hashes: Sequence[PerceptualHash]) -> "Fingerprints":
        """Returns the arrays of some hashes."""
        bits = np.frombuffer(b"".join(bytes.fromhex(each.bits) for each in hashes), np.uint64)
        colours = np.frombuffer(b"".join(bytes.fromhex(each.colours) for each in hashes), np.uint8)
        return cls(
            np.array(ids, np.int64), rearrange(bits, "(n w) -> n w", w=4), rearrange(colours, "(n c) -> n c", c=192)
        )

    @classmethod
    def concatenated(cls, parts: Iterable["Fingerprints"]) -> "Fingerprints":
        """Joins batches; returns an empty one of none."""
        parts = [cls.of((), ()), *parts]
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: np.ndarray) -> "Fingerprints":
        return Fingerprints(self.ids[chosen], self.bits[chosen], self.colours[chosen])


def part_keys(bits: UInt64[np.ndarray, "n 4"], max_bits: int) -> UInt64[np.ndarray, "n parts"]:
    """Returns the keys of each hash: near-duplicates have at least one of them in common, in the same column.

    Two hashes that differ in at most k bits agree in at least one of k + 1 parts (pigeonhole principle). A part has
    bits from all over the hash, as the bits of a flat region are alike in many clips. Equal parts have equal keys;
    unequal ones may have, if they are longer than a key.
    """
    columns = _part_columns(max_bits + 1)
    keys = np.zeros((len(bits), max_bits + 1), np.uint64)
    for start in range(0, len(bits), 4096):  # memory
        rows = slice(start, start + 4096)
        single = np.unpackbits(np.ascontiguousarray(bits[rows]).view(np.uint8), axis=1)
        single = np.concatenate([single, np.zeros((len(single), 1), np.uint8)], axis=1)
        words = np.ascontiguousarray(np.packbits(single[:, columns], axis=2)).view(np.uint64)
        for word in range(words.shape[2]):
            keys[rows] = keys[rows] * np.uint64(0x9E3779B97F4A7C15) + words[:, :, word]
    return keys


@functools.lru_cache(maxsize=4)
def _part_columns(parts: int) -> Int64[np.ndarray, "parts w"]:
    """Returns the bits of each part, filled up to whole words with HASH_BITS, for a bit that is always 0."""
    width = -(-HASH_BITS // parts)
    columns = np.full((parts, width + -width % 64), HASH_BITS)
    for part in range(parts):
        own = np.arange(part, HASH_BITS, parts)
        columns[part, : len(own)] = own
    return columns


def are_near(
    bits_a: UInt64[np.ndarray, "n 4"],
    bits_b: UInt64[np.ndarray, "#n 4"],
    colours_a: UInt8[np.ndarray, "n 192"],
    colours_b: UInt8[np.ndarray, "#n 192"],
    max_bits: int,
) -> Bool[np.ndarray, " n"]:
    """Returns which pairs are near-duplicates; the second of all pairs may be one hash."""
    near = np.bitwise_count(bits_a ^ bits_b).sum(axis=1, dtype=np.int64) <= max_bits
    close = np.flatnonzero(near)
    other = colours_b[close] if len(colours_b) == len(colours_a) else colours_b
    apart = np.abs(colours_a[close].astype(np.int16) - other).max(axis=1, initial=0)
    near[close] = apart <= MAX_COLOUR_DIFFERENCE
    return near


class HashIndex:
    """An index that finds similar hashes by their `part_keys`, without comparing all of them."""

    def __init__(self, max_bits: int):
        self.max_bits = max_bits
        self._count = 0
        self._bits = np.zeros((1024, 4), np.uint64)
        self._colours = np.zeros((1024, 192), np.uint8)
        self._positions: dict[tuple[int, int], list[int]] = {}  # (part, its key) -> positions of clips

    def find_or_add(self, new: PerceptualHash) -> int | None:
        """Returns the position of the first near-duplicate, counted from 0; adds the hash and returns None if none."""
        return self.find_or_add_row(Fingerprints.of((0,), (new,)))

    def find_or_add_row(self, one: Fingerprints) -> int | None:
        """Does the same for fingerprints of one clip."""
        keys = list(enumerate(part_keys(one.bits, self.max_bits)[0].tolist()))
        found = np.unique([position for key in keys for position in self._positions.get(key, ())]).astype(int)
        near = are_near(self._bits[found], one.bits, self._colours[found], one.colours, self.max_bits)
        if near.any():
            return int(found[np.argmax(near)])
        if self._count == len(self._bits):
            self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
            self._colours = np.concatenate([self._colours, np.zeros_like(self._colours)])
        self._bits[self._count], self._colours[self._count] = one.bits[0], one.colours[0]
        for key in keys:
            self._positions.setdefault(key, []).append(self._count)
        self._count += 1
        return None
