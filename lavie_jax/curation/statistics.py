"""Statistics of a set, for its manifest and report: sums that may be formed in pieces and merged in any order.

The pieces, whatever they are, give the same statistics, and their size does not grow with the number of clips: values
are counted after rounding, and of rows only a few are kept.
"""

import dataclasses
import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lavie_jax.curation.inputs import Video
from lavie_jax.curation.video import REASONS, Segment

EXAMPLES = 3  # of dropped scenes listed for each reason
PICTURES = 12  # of dropped scenes shown for each reason

Order = tuple[int, int]  # number of the video, number of its segment: the order of a set
Row = Mapping[str, Any]


@dataclasses.dataclass
class Statistics:
    """Counts over the clips of a set and over what was dropped.

    Attributes:
        frames: {frames per second: frames of all clips}.
        seconds, words, scores: {value: clips}; durations are rounded to 10 ms, scores to 0.01.
        sizes, categories, splits: {value: clips}.
        longest: (-seconds, order, row) of the longest clip; the first of several.
        dropped: {reason: scenes or files}.
        examples: {reason: the first (order, row)}.
        pictures: {reason: (hash, video, segment)} of scenes chosen by a hash of their names, which is a random sample.
    """

    frames: Counter = dataclasses.field(default_factory=Counter)
    seconds: Counter = dataclasses.field(default_factory=Counter)
    words: Counter = dataclasses.field(default_factory=Counter)
    scores: Counter = dataclasses.field(default_factory=Counter)
    sizes: Counter = dataclasses.field(default_factory=Counter)
    categories: Counter = dataclasses.field(default_factory=Counter)
    splits: Counter = dataclasses.field(default_factory=Counter)
    longest: tuple[float, Order, Row] | None = None
    dropped: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[tuple[Order, Row]]] = dataclasses.field(default_factory=dict)
    pictures: dict[str, list[tuple[str, Video, Segment]]] = dataclasses.field(default_factory=dict)

    @property
    def clips(self) -> int:
        """Number of clips."""
        return self.sizes.total()

    @property
    def hours(self) -> float:
        """Duration of all clips."""
        return sum(self.frames[fps] / fps for fps in sorted(self.frames)) / 3600

    def reasons(self) -> dict[str, int]:
        """Returns {reason: scenes or files dropped}, in the order of the filters."""
        return {reason: self.dropped[reason] for reason in REASONS if self.dropped[reason]}

    def add_clip(self, order: Order, row: Row) -> None:
        """Counts a clip, given the fields of its record."""
        seconds = row["frames"] / row["fps"]
        self.frames[row["fps"]] += row["frames"]
        self.seconds[round(seconds, 2)] += 1
        self.words[len(row["caption"].split())] += 1
        if row["aesthetic"] is not None:
            self.scores[round(row["aesthetic"], 2)] += 1
        self.sizes[f"{row['width']}x{row['height']}"] += 1
        self.categories[row["category"]] += 1
        self.splits[row.get("split", "")] += 1
        if self.longest is None or (-seconds, order) < self.longest[:2]:
            self.longest = (-seconds, order, row)

    def add_dropped(self, order: Order, row: Row, video: Video, segment: Segment) -> None:
        """Counts a dropped segment, given its line in the list."""
        self.dropped[segment.reason] += 1
        self._add_example(segment.reason, (order, row))
        if segment.picture or segment.file:
            text = f"{video.name} {segment.start} {segment.end}"
            self._add_picture(
                segment.reason, (hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), video, segment)
            )

    def _add_example(self, reason: str, example: tuple[Order, Row]) -> None:
        examples = self.examples.setdefault(reason, [])
        self.examples[reason] = heapq.nsmallest(EXAMPLES, [*examples, example], key=lambda each: each[0])

    def _add_picture(self, reason: str, picture: tuple[str, Video, Segment]) -> None:
        pictures = self.pictures.setdefault(reason, [])
        if len(pictures) < PICTURES or picture[0] < pictures[-1][0]:
            self.pictures[reason] = heapq.nsmallest(PICTURES, [*pictures, picture], key=lambda each: each[0])

    def merge(self, other: "Statistics") -> None:
        """Adds the counts of other clips to these."""
        for name in ("frames", "seconds", "words", "scores", "sizes", "categories", "splits", "dropped"):
            getattr(self, name).update(getattr(other, name))
        if other.longest is not None and (self.longest is None or other.longest[:2] < self.longest[:2]):
            self.longest = other.longest
        for reason, examples in other.examples.items():
            for example in examples:
                self._add_example(reason, example)
        for reason, pictures in other.pictures.items():
            for picture in pictures:
                self._add_picture(reason, picture)
