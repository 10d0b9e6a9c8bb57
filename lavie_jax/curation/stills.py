"""Latents of captioned pictures, which joint training shows beside clips. Nothing is filtered: only what cannot be
read is left out.
"""

import concurrent.futures
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lavie_jax.curation import assemble
from lavie_jax.curation.latents import Encoder
from lavie_jax.curation.pipeline import LatentJob, Outcome, full_disk_told, refuse_finished, started
from lavie_jax.data import transforms
from lavie_jax.data.records import Records
from lavie_jax.data.sources import open_records, read_image
from lavie_jax.data.video_files import ClipWindow
from lavie_jax.errors import UserError


def encode_stills(what: str, out: Path, job: LatentJob, *, shard_clips: int = 1000) -> Outcome:
    """Makes a set of latents in `out` of all pictures of `what`, "KIND:PATH" as a mixture names its parts.

    Stopped at any moment, the same call goes on and ends with the same shards. Raises UserError, before any work, for
    what cannot be used.
    """
    kind, _, path = what.partition(":")
    records = open_records(kind, path, medium="image", split="train", window=ClipWindow(frames=1), val_fraction=0.0)
    refuse_finished(out)
    encoder = Encoder(job)
    settings = {"stills": what, "shard_clips": shard_clips, "latents": encoder.settings()}
    with started(out, settings) as work, full_disk_told(out):
        kept, lost = [], []
        for index, found in enumerate(_looked_at(records)):
            if isinstance(found, dict):
                size = encoder.size_of(found["height"], found["width"])
                kept.append(assemble.Example(found, size, functools.partial(_pixels, records, index, size)))
            else:
                lost.append({"reason": "unreadable", "detail": str(found)})
        assemble.write_lines(out / assemble.DROPPED, lost)
        if not kept:
            raise UserError(f"none of {len(records)} pictures of {what!r} can be read; the first: {lost[0]['detail']}")
        paths, rows = encoder.write(kept, out, shard_clips)
        assemble.write_lines(out / assemble.CLIPS, rows)
        dropped = {"unreadable": len(lost)} if lost else {}
        assemble.finish(
            out,
            {
                "format": 1,
                "settings": settings,
                "pictures": len(rows),
                "dropped": dropped,
                "latents": encoder.manifest("image", rows),
                "files": assemble.files(out, [*paths, out / assemble.CLIPS, out / assemble.DROPPED]),
            },
        )
    shutil.rmtree(work)
    return Outcome(videos=len(records), clips=len(rows), dropped=dropped, video_seconds=0.0, core_seconds=0.0)


def _looked_at(records: Records) -> Iterator[dict[str, object] | UserError]:
    """What is said of each picture, or why it cannot be read: all are decoded once, as headers do not tell."""

    def look(index: int) -> dict[str, object] | UserError:
        try:
            record = records[index]
            height, width = read_image(record).shape[1:3]
        except UserError as error:
            return error
        return {"source": record.name, "caption": record.caption, "height": height, "width": width}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield from tqdm(pool.map(look, range(len(records))), "pictures", len(records))


def _pixels(records: Records, index: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """A picture as a clip of one frame, (1, H, W, 3), cut to `size` at the centre."""
    yield transforms.resize_crop(read_image(records[index]), height=size[0], width=size[1], rng=None)
