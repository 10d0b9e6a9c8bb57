"""Writes shards and lists from the results of all videos, in the order of the videos' names."""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from lavie_jax.curation.duplicates import HashIndex
from lavie_jax.curation.inputs import HeldOut, Video
from lavie_jax.curation.output import CLIPS, DROPPED, file_hashes, write_lines
from lavie_jax.curation.video import REASONS, Segment, read_result
from lavie_jax.data import shards
from lavie_jax.errors import UserError

NAME = "clips"
_INTERNAL = ("reason", "detail", "file", "picture", "perceptual_hash")  # fields of a Segment that records do not have

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
    """The interface of `latent_encoder.LatentEncoder`, declared here because worker processes must not load jax."""

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

    def manifest(self, medium: str, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Returns the manifest's entry `latents` for the rows that `write` returned."""
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
) -> tuple[dict[str, object], dict[str, Segments]]:
    """Writes shards of `shard_clips` clips and the lists of kept and dropped segments.

    The first of several near-duplicates is kept, of both splits. With an `encoder`, records hold latents.

    Returns:
        The manifest, for `output.write_manifest`; and the dropped segments of each reason, for `report.write`.

    Raises:
        UserError: no clip is left.
    """
    kept, dropped = [], []
    for video, segment in _mark_duplicates(videos, work, duplicate_bits):
        if hold_out:
            held_out = any(each.covers(video.name, segment.start, segment.end) for each in hold_out)
            segment = dataclasses.replace(segment, split="val" if held_out else "train")
        (dropped if segment.reason else kept).append((video, segment))
    counts = Counter(segment.reason for _, segment in dropped)
    counts = {reason: counts[reason] for reason in REASONS if counts[reason]}
    write_lines(out / DROPPED, ({"reason": s.reason, "detail": s.detail, **_fields(v, s)} for v, s in dropped))
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        raise UserError(f"no clip is left of {len(videos)} videos: {reasons}. {os.fspath(out / DROPPED)!r} lists them")
    _check_splits(kept, hold_out)
    latents: dict[str, object] = {}
    if encoder is None:
        paths, rows = _write_clips(kept, work, out, shard_clips)
    else:
        paths, rows = encoder.write([_pending(*pair, work, encoder) for pair in kept], out, shard_clips)
        latents = {"latents": encoder.manifest("video", rows)}
    write_lines(out / CLIPS, rows)
    by_reason = {reason: [(v, s) for v, s in dropped if s.reason == reason] for reason in counts}
    manifest = {
        "format": 1,
        "settings": dict(settings),
        "videos": len(videos),
        "clips": len(kept),
        "hours": sum(segment.frames / segment.fps for _, segment in kept) / 3600,
        "dropped": counts,
        **latents,
        "files": file_hashes(out, [*paths, out / CLIPS, out / DROPPED]),
    }
    return manifest, by_reason


def _check_splits(kept: Segments, hold_out: Sequence[HeldOut]) -> None:
    """Raises UserError if --hold-out leaves nothing for a split."""
    splits = {segment.split for _, segment in kept}
    if hold_out and len(splits) < 2:
        rest = "only clips that --hold-out covers are" if splits == {"val"} else "no clip that --hold-out covers is"
        given = ", ".join(map(str, hold_out))
        raise UserError(f"{rest} left of the videos: both splits need clips; given {given}")


def _mark_duplicates(videos: Sequence[Video], work: Path, duplicate_bits: int) -> Segments:
    """Returns every segment in order, with near-duplicates of earlier kept ones marked as dropped."""
    marked: Segments = []
    index, names = HashIndex(max(duplicate_bits, 0)), []
    for video in videos:
        segments = read_result(video, work)
        if segments is None:
            raise UserError(
                f"the result of {video.name!r} is missing or damaged: run the same command again to recreate it"
            )
        for segment in segments:
            if not segment.reason and duplicate_bits >= 0:
                position = index.find_or_add(segment.perceptual_hash)
                if position is None:
                    names.append(f"{video.name} {segment.start:.2f}-{segment.end:.2f} s")
                else:
                    segment = dataclasses.replace(segment, reason="near-duplicate", detail=f"of {names[position]}")
            marked.append((video, segment))
    return marked


def _write_clips(kept: Segments, work: Path, out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]:
    """Writes shards of encoded clips; returns their paths and one row per record."""
    for stale in (*out.glob(f"{NAME}-*{shards.SUFFIX}"), *out.glob(".[0-9]*-*")):
        stale.unlink()  # complete or temporary, left by a run that was killed while it wrote them
    digests: list[str] = []
    paths = shards.write_shards(_records(kept, work, digests), out, name=NAME, shard_records=shard_clips)
    positions = [{"shard": paths[i // shard_clips].name, "index": i % shard_clips} for i in range(len(kept))]
    rows = [{**position, "sha256": sha, **_fields(*pair)} for position, sha, pair in zip(positions, digests, kept)]
    return paths, rows


def _records(kept: Segments, work: Path, digests: list[str]) -> Iterator[dict[str, object]]:
    """Yields the records, and appends the SHA-256 of each clip to `digests`."""
    for video, segment in tqdm(kept, "shards", unit="clip"):
        content = (work / segment.file).read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
        yield {"video": content, **_fields(video, segment)}


def _pending(video: Video, segment: Segment, work: Path, encoder: LatentWriter) -> PendingRecord:
    clip, size = work / segment.file, encoder.size_of(segment.height, segment.width)
    return PendingRecord(_fields(video, segment), size, functools.partial(encoder.parts_of_clip, clip, size))


def _fields(video: Video, segment: Segment) -> dict[str, object]:
    """Returns the fields of a clip's record, except for the video."""
    fields = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment) if f.name not in _INTERNAL}
    if not segment.split:
        del fields["split"]
    return {"source": video.name, **fields}
