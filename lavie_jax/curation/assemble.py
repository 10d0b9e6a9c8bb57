"""From the results of all videos to shards, lists and the manifest, in the order of the videos' names."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from lavie_jax.curation.duplicates import Index
from lavie_jax.curation.inputs import Video
from lavie_jax.curation.video import REASONS, Segment, read_result
from lavie_jax.data import shards
from lavie_jax.data.video_files import finished
from lavie_jax.errors import UserError

MANIFEST, CLIPS, DROPPED, NAME = "manifest.json", "clips.jsonl", "dropped.jsonl", "clips"
_INTERNAL = ("reason", "detail", "file", "fingerprint")  # fields of a Segment that a record has not

Found = list[tuple[Video, Segment]]


def write(
    videos: Sequence[Video],
    work: Path,
    out: Path,
    *,
    settings: Mapping[str, object],
    duplicate_bits: int,
    shard_clips: int,
) -> dict[str, object]:
    """Writes shards of `shard_clips` clips, and the lists of what was kept and dropped; returns what `finish` writes.

    Of near-duplicates the first is kept. Raises UserError when nothing is left.
    """
    found = _without_duplicates(videos, work, duplicate_bits)
    kept = [(video, segment) for video, segment in found if not segment.reason]
    lost = [(video, segment) for video, segment in found if segment.reason]
    counts = Counter(segment.reason for _, segment in lost)
    dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
    _write_lines(out / DROPPED, ({"reason": s.reason, "detail": s.detail, **_described(v, s)} for v, s in lost))
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise UserError(f"no clip is left of {len(videos)} videos: {reasons}. {os.fspath(out / DROPPED)!r} lists them")
    for before in (*out.glob(f"{NAME}-*{shards.SUFFIX}"), *out.glob(".[0-9]*-*")):
        before.unlink()  # of a run that was stopped while it wrote them, whole or under temporary names
    digests: list[str] = []
    paths = shards.write_shards(_records(kept, work, digests), out, name=NAME, shard_records=shard_clips)
    places = [{"shard": paths[i // shard_clips].name, "index": i % shard_clips} for i in range(len(kept))]
    rows = ({**place, "sha256": sha, **_described(*one)} for place, sha, one in zip(places, digests, kept))
    _write_lines(out / CLIPS, rows)
    return {
        "format": 1,
        "settings": dict(settings),
        "videos": len(videos),
        "clips": len(kept),
        "hours": sum(segment.frames / segment.fps for _, segment in kept) / 3600,
        "dropped": dropped,
        "files": {path.name: _file(path) for path in (*paths, out / CLIPS, out / DROPPED)},
    }


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


def _write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with finished(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _file(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
