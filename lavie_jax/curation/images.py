"""Computes latents of captioned images, for joint training with clips. Only unreadable images are left out."""

import concurrent.futures
import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from lavie_jax.curation import output
from lavie_jax.curation.assemble import PendingRecord
from lavie_jax.curation.job import LatentJob, Outcome
from lavie_jax.curation.latent_encoder import LatentEncoder
from lavie_jax.data import transforms
from lavie_jax.data.records import Records
from lavie_jax.data.sources import open_records, read_image
from lavie_jax.data.video_files import ClipWindow
from lavie_jax.errors import UserError


def encode_images(source: str, out: Path, job: LatentJob, *, shard_clips: int = 1000) -> Outcome:
    """Writes latents of all images of `source`, "KIND:PATH" as in a data mixture, to `out`.

    An interrupted run resumes when called again, and ends with the same shards.

    Raises:
        UserError: before any work, if the source, the weights or `out` cannot be used; later, if no image is readable.
    """
    kind, _, path = source.partition(":")
    records = open_records(kind, path, medium="image", split="train", window=ClipWindow(frames=1), val_fraction=0.0)
    output.refuse_finished(out)
    encoder = LatentEncoder(job)
    # "stills" is the name that interrupted runs of earlier versions stored.
    settings = {"stills": source, "shard_clips": shard_clips, "latents": encoder.settings()}
    with output.open_output(out, settings) as work:
        kept, unreadable = [], []
        for index, fields in enumerate(_inspect(records)):
            if isinstance(fields, UserError):
                unreadable.append({"reason": "unreadable", "detail": str(fields)})
                continue
            size = encoder.size_of(fields["height"], fields["width"])
            kept.append(PendingRecord(fields, size, functools.partial(_pixels, records, index, size)))
        output.write_lines(out / output.DROPPED, unreadable)
        if not kept:
            raise UserError(
                f"none of the {len(records)} images of {source!r} can be read; the first: {unreadable[0]['detail']}"
            )
        paths, rows = encoder.write(kept, out, shard_clips)
        output.write_lines(out / output.CLIPS, rows)
        dropped = {"unreadable": len(unreadable)} if unreadable else {}
        manifest = {
            "format": 1,
            "settings": settings,
            "pictures": len(rows),
            "dropped": dropped,
            "latents": encoder.manifest("image", Counter(Path(row["shard"]).parent.name for row in rows)),
            "files": output.file_hashes(out, [*paths, out / output.CLIPS, out / output.DROPPED]),
        }
        output.write_manifest(out, manifest)
    shutil.rmtree(work)
    return Outcome(videos=len(records), clips=len(rows), dropped=dropped, video_seconds=0.0, core_seconds=0.0)


def _inspect(records: Records) -> Iterator[dict[str, object] | UserError]:
    """Yields the fields of each image, or why it cannot be read. Decodes every image, as headers can be intact."""

    def inspect(index: int) -> dict[str, object] | UserError:
        """Returns the fields of an image, or the error instead of raising it, for the thread pool."""
        try:
            record = records[index]
            height, width = read_image(record).shape[1:3]
        except UserError as error:
            return error
        return {"source": record.name, "caption": record.caption, "height": height, "width": width}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield from tqdm(pool.map(inspect, range(len(records))), "images", len(records))


def _pixels(records: Records, index: int, size: tuple[int, int]) -> Iterator[UInt8[np.ndarray, "1 H W 3"]]:
    """Yields an image, center-cropped to `size`, as a clip of one frame."""
    yield transforms.resize_crop(read_image(records[index]), height=size[0], width=size[1], rng=None)
