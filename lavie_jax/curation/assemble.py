"""From the results of all videos to shards, lists and the manifest, in the order of the videos' names."""

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from lavie_jax.curation.duplicates import Index
from lavie_jax.curation.inputs import Video
from lavie_jax.curation.video import REASONS, Segment, read_result
from lavie_jax.data import shards
from lavie_jax.data.video_files import finished
from lavie_jax.errors import UserError

MANIFEST, CLIPS, DROPPED, NAME = "manifest.json", shards.LIST, "dropped.jsonl", "clips"
_INTERNAL = ("reason", "detail", "file", "fingerprint")  # fields of a Segment that a record has not

Found = list[tuple[Video, Segment]]


@dataclasses.dataclass(frozen=True)
class Example:
    """What becomes a record of latents: its other `fields`, the size of its frames, and the frames, in parts."""

    fields: Mapping[str, object]
    size: tuple[int, int]
    parts: Callable[[], Iterator[np.ndarray]]


@runtime_checkable
class Encoder(Protocol):
    """What makes latents: `latents.Encoder`. Named here because the workers, who import this file, load no jax."""

    def size_of(self, height: int, width: int) -> tuple[int, int]: ...

    def parts_of_clip(self, clip: Path, size: tuple[int, int]) -> Iterator[np.ndarray]: ...

    def write(self, examples: Sequence[Example], out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]: ...

    def manifest(self, medium: str, rows: Sequence[Mapping[str, object]]) -> dict[str, object]: ...

    def pictures(self, stored: np.ndarray) -> np.ndarray: ...


def write(
    videos: Sequence[Video],
    work: Path,
    out: Path,
    *,
    settings: Mapping[str, object],
    duplicate_bits: int,
    shard_clips: int,
    encoder: Encoder | None = None,
) -> dict[str, object]:
    """Writes shards of `shard_clips` clips, and the lists of what was kept and dropped; returns what `finish` writes.

    Of near-duplicates the first is kept. With an `encoder`, records hold latents. Raises UserError when nothing is
    left.
    """
    found = _without_duplicates(videos, work, duplicate_bits)
    kept = [(video, segment) for video, segment in found if not segment.reason]
    lost = [(video, segment) for video, segment in found if segment.reason]
    counts = Counter(segment.reason for _, segment in lost)
    dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
    write_lines(out / DROPPED, ({"reason": s.reason, "detail": s.detail, **_described(v, s)} for v, s in lost))
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise UserError(f"no clip is left of {len(videos)} videos: {reasons}. {os.fspath(out / DROPPED)!r} lists them")
    told: dict[str, object] = {}
    if encoder is None:
        paths, rows = _write_clips(kept, work, out, shard_clips)
    else:
        paths, rows = encoder.write([_example(*one, work, encoder) for one in kept], out, shard_clips)
        told = {"latents": encoder.manifest("video", rows)}
    write_lines(out / CLIPS, rows)
    return {
        "format": 1,
        "settings": dict(settings),
        "videos": len(videos),
        "clips": len(kept),
        "hours": sum(segment.frames / segment.fps for _, segment in kept) / 3600,
        "dropped": dropped,
        **told,
        "files": files(out, [*paths, out / CLIPS, out / DROPPED]),
    }


def _write_clips(kept: Found, work: Path, out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]:
    """(shards of encoded clips, a row for each record)."""
    for before in (*out.glob(f"{NAME}-*{shards.SUFFIX}"), *out.glob(".[0-9]*-*")):
        before.unlink()  # of a run that was stopped while it wrote them, whole or under temporary names
    digests: list[str] = []
    paths = shards.write_shards(_records(kept, work, digests), out, name=NAME, shard_records=shard_clips)
    places = [{"shard": paths[i // shard_clips].name, "index": i % shard_clips} for i in range(len(kept))]
    rows = [{**place, "sha256": sha, **_described(*one)} for place, sha, one in zip(places, digests, kept)]
    return paths, rows


def _example(video: Video, segment: Segment, work: Path, encoder: Encoder) -> Example:
    """A clip, as what its latents are made of."""
    clip, size = work / video.key / segment.file, encoder.size_of(segment.height, segment.width)
    return Example(_described(video, segment), size, functools.partial(encoder.parts_of_clip, clip, size))


def finish(out: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest, which says that the set is whole."""
    with finished(out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _without_duplicates(videos: Sequence[Video], work: Path, duplicate_bits: int) -> Found:
    """Every segment in order; those that were kept and nearly repeat an earlier one are dropped."""
    found: Found = []
    index, known = Index(max(duplicate_bits, 0)), []
    for video in videos:
        segments = read_result(work / video.key)
        if segments is None:
            raise UserError(f"the result of {video.name!r} is gone or damaged: the same command makes it again")
        for segment in segments:
            if not segment.reason and duplicate_bits >= 0:
                place = index.find_or_add(segment.fingerprint)
                if place is None:
                    known.append(f"{video.name} {segment.start:.2f}-{segment.end:.2f} s")
                else:
                    segment = dataclasses.replace(segment, reason="near-duplicate", detail=f"of {known[place]}")
            found.append((video, segment))
    return found


def _described(video: Video, segment: Segment) -> dict[str, object]:
    """What is said of a clip: the fields of its record, but for the video."""
    fields = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment) if f.name not in _INTERNAL}
    return {"source": video.name, **fields}


def _records(kept: Found, work: Path, digests: list[str]) -> Iterator[dict[str, object]]:
    for video, segment in tqdm(kept, "shards", unit="clip"):
        content = (work / video.key / segment.file).read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
        yield {"video": content, **_described(video, segment)}


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """A line of JSON for each row."""
    with finished(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def files(out: Path, paths: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Size and SHA-256 of each file, by its place in `out`."""
    return {path.relative_to(out).as_posix(): _file(path) for path in paths}


def _file(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
