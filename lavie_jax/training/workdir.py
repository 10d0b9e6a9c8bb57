"""A run's workdir: a folder, or a bucket, `gs://BUCKET/PATH`.

With a bucket, Orbax writes checkpoints to it directly, on all hosts. Everything else is written to a folder of this
machine, and uploaded by the first host after each checkpoint: the exported weights, metrics, samples.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import logging

from lavie_jax import remote
from lavie_jax.disk import cache_folder, process_name
from lavie_jax.errors import UserError, check_folder
from lavie_jax.training.bucket_lock import BucketLock
from lavie_jax.training.lock import Lock

CHECKPOINTS, WEIGHTS = "checkpoints", "weights"
CONTINUED = ("metrics.jsonl", "wandb_run.json")  # files that a resumed run continues


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where a run writes.

    Attributes:
        folder: the workdir, or this machine's copy of it.
        url: the bucket's URL, or None for a folder.
    """

    folder: Path
    url: str | None = None
    _uploaded: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, place: Path) -> "Workdir":
        """Returns the workdir at a path or URL."""
        url = remote.url(place)
        if url is None:
            return cls(place)
        name = hashlib.sha256(url.encode()).hexdigest()[:32]
        return cls(cache_folder("runs") / f"{name}-{process_name()}", url)

    def check(self) -> None:
        """Raises UserError if the workdir cannot be written to, before anything expensive."""
        if self.url is None:
            return check_folder(self.folder, f"--workdir {self.folder}")
        if not self.url.startswith("gs://"):
            # Orbax (0.12) marks complete checkpoints in gs:// by an object; in s3:// it renames them object by object.
            raise UserError(f"--workdir {self.url}: only gs:// and folders are supported: give the path of a mount")
        with remote.one_line(self.url):
            remote.filesystem(self.url).exists(self.url)

    @property
    def checkpoints(self) -> Any:
        """The path of the checkpoints: a Path, or etils' path in a bucket."""
        if self.url is None:
            return self.folder / CHECKPOINTS
        from etils import epath  # comes with Orbax

        return epath.Path(self.url) / CHECKPOINTS

    def lock(self) -> Lock | BucketLock:
        """Takes the run's lock. Raises UserError if another run has it."""
        return Lock(self.folder) if self.url is None else BucketLock(self.url)

    def pull(self) -> None:
        """Downloads what a resumed run continues, from a bucket."""
        if self.url is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed process: in a container, this one has its number
        self.folder.mkdir(parents=True)
        with remote.one_line(self.url):
            system = remote.filesystem(self.url)
            system.invalidate_cache()
            for name in CONTINUED:
                if system.exists(f"{self.url}/{name}"):
                    system.get_file(f"{self.url}/{name}", str(self.folder / name))
            if system.exists(f"{self.url}/{WEIGHTS}/config.json"):  # uploaded last: without it, the others are partial
                system.get(f"{self.url}/{WEIGHTS}", str(self.folder / WEIGHTS), recursive=True)

    def close(self, *, push: bool) -> None:
        """Removes this machine's copy of a bucket; the first host pushes before."""
        if push:
            self.push()
        if self.url is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def push(self) -> None:
        """Uploads files that changed since the last time. A failure is logged, and the next push tries again."""
        if self.url is None:
            return
        files, config = remote.files_in(self.folder), f"{WEIGHTS}/config.json"
        if config not in files:  # after a pull that was cut short
            files = {name: path for name, path in files.items() if not name.startswith(f"{WEIGHTS}/")}
        stamps = {name: remote.stamp(path) for name, path in files.items()}
        changed = {name: now for name, now in stamps.items() if self._uploaded.get(name) != now}
        try:
            system = remote.filesystem(self.url)
            if any(name.startswith(f"{WEIGHTS}/") for name in changed) and system.exists(f"{self.url}/{config}"):
                system.rm_file(f"{self.url}/{config}")  # until all files of the weights are there
                changed[config] = stamps[config]
            for name in _config_last(changed):
                system.put_file(str(files[name]), f"{self.url}/{name}")
                self._uploaded[name] = changed[name]
        except Exception as error:  # of the network or the store
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logging.error("%s could not be written (%s). Training continues.", self.url, reason)


def _config_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == f"{WEIGHTS}/config.json", name))
