"""Data in a bucket, `gs://BUCKET/PATH` or `s3://BUCKET/PATH`: copied to this machine before they are opened.

A copy of the whole set, because the libraries that read shards, tars and videos need files, and because every batch has
records of all shards. Sets that are larger than the disk need a mount of the bucket (docs/tpu.md).
"""

import fnmatch
import functools
import shutil
from collections.abc import Callable
from pathlib import PurePosixPath

from absl import logging

from lavie_jax import remote
from lavie_jax.data.folders import TABLES
from lavie_jax.data.shards import LIST
from lavie_jax.data.shards import SUFFIX as SHARD
from lavie_jax.errors import UserError

SINGLE = (SHARD, ".tar")  # endings of files that are data by themselves
WORKERS = 8  # downloads at the same time
SPARE = 2**30  # bytes of the disk that a copy leaves free


@functools.lru_cache(maxsize=256)  # one version of the data for the whole run, which opens them several times
def local_data(path: str) -> str:
    """Returns the path on this machine of data that a user gave: `path` itself, or that of the copy of a bucket's.

    Args:
        path: what `open_records` takes: a folder, a table, a shard or a pattern of shards.

    Raises:
        UserError: the bucket cannot be read, has no such files, or they do not fit on the disk.
    """
    if (place := remote.url(path)) is None:
        return path
    base, pattern = _folder_and_pattern(place)
    top = _with_list(base)
    below = base.removeprefix(top).strip("/")
    store = remote.Store.open(top)
    chosen = _chooser(below, pattern)
    files = [name for name in store.files if name == LIST or chosen(name)]
    if files in ([], [LIST]):
        raise UserError(f"{place} does not exist, or contains no files")
    _check_space(store, files, place)
    if store.missing(files):
        logging.info("%s is copied to %s", place, store.folder)
    folder = store.download(files, workers=WORKERS, progress=True)
    return str(folder / below / pattern)


def _folder_and_pattern(place: str) -> tuple[str, str]:
    """The folder of a place, and the pattern or the name of files in it; "" for all of them."""
    folder, _, name = place.rpartition("/")
    own = any(character in name for character in "*?[") or PurePosixPath(name).suffix.lower() in (*SINGLE, *TABLES)
    return (folder, name) if own and remote.url(folder) else (place, "")


def _with_list(folder: str) -> str:
    """The folder above, if it has the list of clips, which decides their splits (`ShardRecords`); else the folder."""
    above = folder.rpartition("/")[0]
    if remote.url(above) is None:
        return folder
    with remote.one_line(folder):
        return above if remote.filesystem(above).exists(f"{above}/{LIST}") else folder


def _chooser(below: str, pattern: str) -> Callable[[str], bool]:
    """Returns whether a name is in the folder `below`, and of `pattern`; files of a table are anywhere below it."""
    prefix = f"{below}/" if below else ""
    everything = not pattern or PurePosixPath(pattern).suffix.lower() in TABLES

    def chosen(name: str) -> bool:
        rest = name.removeprefix(prefix)
        if not name.startswith(prefix):
            return False
        return everything or rest in (pattern, LIST) or ("/" not in rest and fnmatch.fnmatchcase(rest, pattern))

    return chosen


def _check_space(store: remote.Store, files: list[str], place: str) -> None:
    """Raises UserError if files that are not here yet do not fit on the disk."""
    needed = sum(store.sizes[name] for name in store.missing(files))
    disk = next(folder for folder in store.folder.parents if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if needed and needed > free - SPARE:
        raise UserError(
            f"{place}: {needed / 1e9:.1f} GB have to be copied, but {disk} has {free / 1e9:.1f} GB free: set "
            "XDG_CACHE_HOME to a folder on a larger disk, or mount the bucket and give the mount's path"
        )
