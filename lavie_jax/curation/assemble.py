"""Writes shards and lists from the results of all videos, in the order of the videos' names."""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from lavie_jax.curation.duplicates import HashIndex
from lavie_jax.curation.inputs import HeldOut, Video
from lavie_jax.curation.output import CLIPS, DROPPED, file_hashes, write_lines
from lavie_jax.curation.statistics import Order, Statistics
from lavie_jax.curation.video import Segment, read_result
from lavie_jax.data import shards
from lavie_jax.data.buckets import Size
from lavie_jax.errors import UserError

NAME = "clips"
# Fields of a Segment that records do not have.
_INTERNAL = ("reason", "detail", "file", "picture", "perceptual_hash", "samples")

Segments = list[tuple[Video, Segment]]


@dataclasses.dataclass(frozen=True)
class PendingRecord:
    """A clip or an image whose latents are to be computed.

    Attributes:
        fields: the other fields of its record.
        size: (height, width) of its frames.
        parts: returns the frames, uint8 (T, H, W, 3), a few at a time.
    """

    fields: Mapping[str, object]
    size: tuple[int, int]
    parts: Callable[[], Iterator[np.ndarray]]


@runtime_checkable
class LatentWriter(Protocol):
    """The interface of `latent_encoder.LatentEncoder`, declared here because worker processes must not load jax.

    Attributes:
        sizes: (height, width) of the frames.
    """

    sizes: tuple[Size, ...]

    def settings(self) -> dict[str, object]:
        """Returns everything that determines the latents, ready for JSON."""
        ...

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size to which frames of (height, width) are resized."""
        ...

    def parts_of_clip(self, clip: Path, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yields the frames of a clip, resized to `size`, a few at a time."""
        ...

    def write(self, records: Sequence[PendingRecord], out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]:
        """Writes shards of latents. Returns their paths and a row for each record."""
        ...

    def write_null_text(self, out: Path) -> Path:
        """Writes the encoded null caption of a set; returns its path."""
        ...

    def write_shard(
        self, records: Sequence[PendingRecord], path: Path, out: Path, done: Callable[[int], Any]
    ) -> list[dict]:
        """Writes a shard, unless it exists with these records, and returns its rows. Calls `done` with clip counts."""
        ...

    def manifest(self, medium: str, counts: Mapping[str, int]) -> dict[str, object]:
        """Returns the manifest's entry `latents`, given the number of records in the folder of each size."""
        ...

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Returns the frames of stored latents."""
        ...


def write_set(
    videos: Sequence[Video],
    work: Path,
    out: Path,
    *,
    settings: Mapping[str, object],
    duplicate_bits: int,
    shard_clips: int,
    hold_out: Sequence[HeldOut] = (),
    encoder: LatentWriter | None = None,
) -> tuple[dict[str, object], Statistics, list[tuple[str, int]]]:
    """Writes shards of `shard_clips` clips and the lists of kept and dropped segments.

    The first of several near-duplicates is kept, of both splits. With an `encoder`, records hold latents.

    Returns:
        The manifest, for `output.write_manifest`; and for `report.write` statistics and (shard, index) of each clip.

    Raises:
        UserError: no clip is left.
    """
    statistics, kept, dropped = Statistics(), [], []
    for order, video, segment in _mark_duplicates(videos, work, duplicate_bits):
        segment = held_out(video, segment, hold_out)
        count(statistics, order, video, segment)
        (dropped if segment.reason else kept).append((video, segment))
    write_lines(out / DROPPED, (dropped_row(*pair) for pair in dropped))
    check_clips(statistics, len(videos), hold_out, out)
    latents: dict[str, object] = {}
    if encoder is None:
        paths, rows = _write_clips(kept, work, out, shard_clips)
    else:
        paths, rows = encoder.write([pending(*pair, work, encoder) for pair in kept], out, shard_clips)
        latents = {"latents": encoder.manifest("video", Counter(Path(row["shard"]).parent.name for row in rows))}
    write_lines(out / CLIPS, rows)
    files = file_hashes(out, [*paths, out / CLIPS, out / DROPPED])
    manifest = make_manifest(statistics, len(videos), settings, files, latents)
    return manifest, statistics, [(row["shard"], row["index"]) for row in rows]


def held_out(video: Video, segment: Segment, hold_out: Sequence[HeldOut]) -> Segment:
    """Returns a segment with its split, if --hold-out decides it."""
    if not hold_out:
        return segment
    covered = any(each.covers(video.name, segment.start, segment.end) for each in hold_out)
    return dataclasses.replace(segment, split="val" if covered else "train")


def count(statistics: Statistics, order: Order, video: Video, segment: Segment) -> None:
    """Adds a segment to statistics."""
    if segment.reason:
        statistics.add_dropped(order, dropped_row(video, segment), video, segment)
    else:
        statistics.add_clip(order, fields_of(video, segment))


def make_manifest(
    statistics: Statistics, videos: int, settings: Mapping[str, object], files: Mapping, latents: Mapping
) -> dict[str, object]:
    """Returns the manifest of a set."""
    return {
        "format": 1,
        "settings": dict(settings),
        "videos": videos,
        "clips": statistics.clips,
        "hours": statistics.hours,
        "dropped": statistics.reasons(),
        **latents,
        "files": dict(files),
    }


def check_clips(statistics: Statistics, videos: int, hold_out: Sequence[HeldOut], out: Path) -> None:
    """Raises UserError if no clip is left, or if --hold-out leaves nothing for a split."""
    if not statistics.clips:
        reasons = ", ".join(f"{n} {reason}" for reason, n in statistics.reasons().items())
        raise UserError(f"no clip is left of {videos} videos: {reasons}. {os.fspath(out / DROPPED)!r} lists them")
    splits = set(statistics.splits)
    if hold_out and len(splits) < 2:
        rest = "only clips that --hold-out covers are" if splits == {"val"} else "no clip that --hold-out covers is"
        given = ", ".join(map(str, hold_out))
        raise UserError(f"{rest} left of the videos: both splits need clips; given {given}")


def _mark_duplicates(videos: Sequence[Video], work: Path, bits: int) -> Iterator[tuple[Order, Video, Segment]]:
    """Yields every segment in order, with near-duplicates of earlier kept ones marked as dropped."""
    index, kept = HashIndex(max(bits, 0)), []
    for number, video in enumerate(videos):
        segments = read_result(video, work)
        if segments is None:
            raise UserError(
                f"the result of {video.name!r} is missing or damaged: run the same command again to recreate it"
            )
        for position, segment in enumerate(segments):
            if not segment.reason and bits >= 0:
                earlier = index.find_or_add(segment.perceptual_hash)
                if earlier is None:
                    kept.append(clip_name(video, segment))
                else:
                    segment = mark_duplicate(segment, kept[earlier])
            yield (number, position), video, segment


def clip_name(video: Video, segment: Segment) -> str:
    """Returns the name of a clip in texts."""
    return f"{video.name} {segment.start:.2f}-{segment.end:.2f} s"


def mark_duplicate(segment: Segment, of: str) -> Segment:
    """Returns a segment as dropped, as it is near the clip named `of`."""
    return dataclasses.replace(segment, reason="near-duplicate", detail=f"of {of}")


def _write_clips(kept: Segments, work: Path, out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]:
    """Writes shards of encoded clips; returns their paths and one row per record."""
    for stale in (*out.glob(f"{NAME}-*{shards.SUFFIX}"), *out.glob(".[0-9]*-*")):
        stale.unlink()  # complete or temporary, left by a run that was killed while it wrote them
    digests: list[str] = []
    records = clip_records(tqdm(kept, "shards", unit="clip"), work, digests)
    paths = shards.write_shards(records, out, name=NAME, shard_records=shard_clips)
    names = (paths[i // shard_clips].name for i in range(len(kept)))
    return paths, [clip_row(name, i % shard_clips, digests[i], *kept[i]) for i, name in enumerate(names)]


def clip_records(kept: Iterable[tuple[Video, Segment]], work: Path, digests: list[str]) -> Iterator[dict[str, object]]:
    """Yields the records, and appends the SHA-256 of each clip to `digests`."""
    for video, segment in kept:
        content = (work / segment.file).read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
        yield {"video": content, **fields_of(video, segment)}


def clip_row(shard: str, index: int, sha256: str, video: Video, segment: Segment) -> dict[str, object]:
    """Returns the line of a clip in the list."""
    return {"shard": shard, "index": index, "sha256": sha256, **fields_of(video, segment)}


def dropped_row(video: Video, segment: Segment) -> dict[str, object]:
    """Returns the line of a dropped segment in the list."""
    return {"reason": segment.reason, "detail": segment.detail, **fields_of(video, segment)}


def pending(video: Video, segment: Segment, work: Path, encoder: LatentWriter) -> PendingRecord:
    """Returns a clip whose latents are to be computed."""
    clip, size = work / segment.file, encoder.size_of(segment.height, segment.width)
    return PendingRecord(fields_of(video, segment), size, functools.partial(encoder.parts_of_clip, clip, size))


def fields_of(video: Video, segment: Segment) -> dict[str, object]:
    """Returns the fields of a clip's record, except for the video."""
    fields = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment) if f.name not in _INTERNAL}
    if not segment.split:
        del fields["split"]
    return {"source": video.name, **fields}
