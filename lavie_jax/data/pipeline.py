"""Batches for training: `batches(...)` gives dicts of numpy arrays from a step on, for ever.

Example i of the global stream is a pure function of (config, i): the clip, the stills beside it, the random
crop and the dropped captions. Row r of step s is example s B + r, and a process makes the rows that its devices
hold. So the position in the data is the step, one integer, and a batch is the same for any number of processes
and of their workers; a resumed run starts at `start_step`. grain runs the workers; without them a thread of this
process does the same work, and grain is not imported.
"""

import dataclasses
import functools
import hashlib
import math
import queue
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from lavie_jax.data import tokens, transforms
from lavie_jax.data.buckets import Buckets
from lavie_jax.data.config import DataConfig, latent_paths, make_source, mixture_weights
from lavie_jax.data.mixture import Mixture, largest_shares
from lavie_jax.data.sources import Item, Source
from lavie_jax.errors import UserError

_EXAMPLES = 2**50  # endless, and still far from overflow after slicing and batching


@dataclasses.dataclass(frozen=True)
class Examples:
    """The global stream of examples as a random-access source; `batch` of them are a step's."""

    config: DataConfig
    source: Source | Buckets
    batch: int = 1

    def __len__(self) -> int:
        return _EXAMPLES

    def fingerprint(self) -> str:
        """SHA-256 of the number of clips and of the first example, by which hosts tell whether they have one data set.

        UserError when the example cannot be read.
        """
        digest = hashlib.sha256(str(len(self.source)).encode())
        for name, value in sorted(self[0].items()):
            digest.update(name.encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else str(value).encode())
        return digest.hexdigest()

    @functools.cached_property
    def encoded(self) -> bool:
        """Whether clips and images are latents."""
        return bool(latent_paths(self.config))

    def __getitem__(self, index: int) -> dict:
        """Example `index`: uint8 `video` and `images`, `caption` and `image_captions`, dropped or not, `skipped`.

        Of sets of latents float16 `video_latents`, `image_latents`, `text` and `image_text`, each where there is any.
        """
        c, index = self.config, int(index)
        rng = np.random.default_rng([c.seed, index])
        source = self.source
        if isinstance(source, Buckets):
            source, index, (height, width) = source.of(index)
            c = dataclasses.replace(c, height=height, width=width)
        empty = np.zeros((0, c.height, c.width, 3), np.uint8)
        video = Item(empty, c.null_caption)
        if c.frames and c.handheld and rng.random() < c.handheld:
            reach = transforms.camera_reach(c.height, c.width)
            # Counted as the images beside clips are, so that a mixture finds the same step.
            picture = source.image(index * max(c.images, 1), rng, margin=reach)
            shape = {"frames": c.frames, "height": c.height, "width": c.width}
            fps = c.fps or transforms.USUAL_FPS
            video = picture._replace(pixels=transforms.handheld(picture.pixels, **shape, fps=fps, rng=rng))
        elif c.frames:
            video = source.video(index, rng)
        stills = [source.image(index * c.images + j, rng) for j in range(c.images)]
        items, kept = [video, *stills], rng.random(1 + c.images) >= c.caption_drop
        captions = [item.caption if keep else c.null_caption for item, keep in zip(items, kept)]
        told = {
            "caption": captions[0],
            "image_captions": captions[1:],
            "skipped": [text for item in items for text in item.skipped],
        }
        if self.encoded:
            texts = [item.text if keep else item.null_text for item, keep in zip(items, kept)]
            if c.frames:
                told |= {"video_latents": video.pixels, "text": texts[0]}
            if c.images:
                told |= {"image_latents": np.stack([item.pixels for item in stills]), "image_text": np.stack(texts[1:])}
            return told
        images = np.stack([item.pixels for item in stills]) if stills else empty
        return {"video": video.pixels, "images": images, **told}


def _collate(examples: Sequence[dict]) -> dict:
    """Arrays stacked; captions stay lists."""
    columns = {key: [example[key] for example in examples] for key in examples[0]}
    return {key: np.stack(rows) if isinstance(rows[0], np.ndarray) else rows for key, rows in columns.items()}


@dataclasses.dataclass(frozen=True)
class _Mine:
    """Of the examples of every step only the `rows` of this process, one after the other."""

    examples: Examples
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.examples) // self.examples.batch * len(self.rows)

    def __getitem__(self, index: int) -> dict:
        step, place = divmod(int(index), len(self.rows))
        return self.examples[step * self.examples.batch + self.rows[place]]


def _plain(mine: _Mine, start: int) -> Iterator[dict]:
    """What `_grain` gives, in this thread."""
    count, step = len(mine.rows), start
    while True:
        yield _collate([mine[step * count + i] for i in range(count)])
        step += 1


def _leave_ctrl_c_to_the_run(*_: int) -> None:
    """In a worker: Ctrl-C reaches the whole group, and the run still needs data until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _grain(mine: _Mine, start: int, workers: int) -> Iterator[dict]:
    """Batches by grain's worker processes, in order."""
    try:
        import grain  # needed by those who ask for workers only
    except ImportError as error:
        raise UserError(f"workers={workers} needs the package grain: install it, or set workers=0") from error
    from absl import flags

    # grain's workers read absl flags, which a program that never parses them leaves unparsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(mine).batch(len(mine.rows), drop_remainder=True, batch_fn=_collate)[start:]
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.to_iter_dataset(read).mp_prefetch(options, worker_init_fn=_leave_ctrl_c_to_the_run))


def _prefetched(source: Iterator[dict], count: int) -> Iterator[dict]:
    """Items of `source`, made by a thread that is `count` ahead. Its errors arrive at the reader."""
    ready: queue.Queue = queue.Queue(count)
    stop = threading.Event()

    def put(item: tuple) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put((item, None)):
                    break
        except Exception as error:
            put((None, error))
        if hasattr(source, "close"):
            source.close()

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)


def open_examples(config: DataConfig, *, batch_size: int) -> Examples:
    """The examples that a config names, `batch_size` a step, of all processes together.

    Raises UserError for data that cannot be read, and with fewer clips than a batch.
    """
    if batch_size < 1:
        raise UserError(f"a batch holds at least 1 example; given {batch_size}")
    source = make_source(config, batch_size=batch_size)
    if config.split == "train":  # held-out clips may come again
        _check_enough(config, source, batch_size)
    if isinstance(source, Buckets):
        # A warning, because a run must show what it compiles.
        logging.warning("buckets of split %s: %s; a program is compiled for each", config.split, source)
    return Examples(config, source, batch_size)


def _check_enough(config: DataConfig, source: Source | Buckets, batch_size: int) -> None:
    """Refuses a set of clips, or a part of a mixture, that would show a clip twice in a step."""
    where = config.path or config.image_path or ", ".join(config.videos + config.stills)
    parts = [(where, source, batch_size)]
    if isinstance(source, Mixture) and config.frames:
        shares = largest_shares(source.video_order.weights)
        counts = [math.ceil(batch_size * share - 1e-9) for share in shares]  # 7 x (1 / 7) may be a little over 1
        parts = list(zip(config.videos, source.videos, counts))
    for name, part, needed in parts:
        if len(part) < needed:
            share = f", of which {needed} are its share," if needed < batch_size else ""
            raise UserError(f"a batch of {batch_size}{share} needs as many clips; {name!r} has {len(part)} to train on")


def batches(
    examples: Examples,
    tokenizer,
    *,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start_step`, `start_step` + 1, ... of this process, without end.

    Args:
      examples: what batches are made of (`open_examples`).
      tokenizer: a CLIP tokenizer (`lavie_jax.data.tokens`), or None for batches without tokens (a VAE's).
      rows: those that this process makes of each batch (`parallel.local_rows`); default: all.
      start_step: the first batch's number; a resumed run gives the step it resumes at.
      workers: worker processes, by grain; 0 is a thread of this process.
      prefetch: batches that are made ahead.

    Returns an iterator of {`video` (B, T, H, W, 3) float32 in [-1, 1], `images` (B, M, H, W, 3) likewise,
    `tokens` (B, L) int32, `image_tokens` (B, M, L) int32}, B = the number of `rows`; of sets of latents, all
    float32, `video_latents` (B, T, h, w, 2 C) and `text` (B, L, D) if T > 0, `image_latents` (B, M, h, w, 2 C) and
    `image_text` (B, M, L, D) if M > 0 (mean and standard deviation of posteriors, see `latents.py`). Close it to end
    its thread and workers.
    """
    if workers < 0 or prefetch < 1 or start_step < 0:
        raise UserError(
            f"workers and start_step are at least 0 and prefetch 1; given {workers}, {start_step}, {prefetch}"
        )
    mine = _Mine(examples, range(examples.batch) if rows is None else rows)
    raw = _grain(mine, start_step, workers) if workers else _plain(mine, start_step)
    ids = None if tokenizer is None else tokens.CachedTokens(tokenizer)
    watched = _watched(raw, examples.config, start_step)
    return _prefetched(_arrays(watched, ids), prefetch)


def _watched(raw: Iterator[dict], config: DataConfig, start_step: int) -> Iterator[dict]:
    """The same batches; says when the mixture changes, and counts, names and limits what was skipped."""
    seen: set[str] = set()
    shares: dict[str, float] = {}
    try:
        for step, batch in enumerate(raw, start_step):
            if shares != (now := mixture_weights(config, step)):
                shares = now
                # A warning, because a run must show what it was trained on.
                logging.warning("data from step %d: %s", step, ", ".join(f"{k} {v:.3g}" for k, v in shares.items()))
            for text in (text for row in batch.pop("skipped") for text in row):
                if text not in seen:
                    seen.add(text)
                    logging.warning("skipped, number %d: %s", len(seen), text)
                if len(seen) > config.max_unreadable:
                    raise UserError(
                        f"{len(seen)} records were skipped, more than data.max_unreadable allows; the last: {text}"
                    )
            yield batch
    finally:
        if hasattr(raw, "close"):
            raw.close()


def _arrays(raw: Iterator[dict], ids: tokens.CachedTokens | None) -> Iterator[dict[str, np.ndarray]]:
    """Pixels and latents as floats, captions as tokens: here, so that workers send bytes and load no tokenizer."""
    try:
        for batch in raw:
            if "video" not in batch:  # latents, whose captions are encoded already
                yield {key: rows.astype(np.float32) for key, rows in batch.items() if isinstance(rows, np.ndarray)}
                continue
            out = {key: transforms.to_float(batch[key]) for key in ("video", "images")}
            if ids is not None:
                out["tokens"] = ids(batch["caption"])
                flat = ids([caption for row in batch["image_captions"] for caption in row])
                out["image_tokens"] = flat.reshape(*batch["images"].shape[:2], ids.length)
            yield out
    finally:
        raw.close()
