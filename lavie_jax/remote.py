"""Object stores, `gs://BUCKET/PATH` and `s3://BUCKET/PATH`, through fsspec: Google Cloud Storage and Amazon S3.

Credentials are those of the libraries: `gcloud auth application-default login` or the machine's service account, and
AWS's environment variables or `~/.aws`. `STORAGE_EMULATOR_HOST` and `AWS_ENDPOINT_URL` select another server.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavie_jax.disk import cache_folder, new_file
from lavie_jax.errors import UserError

PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # {protocol: (package, extra of this project)}
URL = re.compile(r"(gs|s3):/+(.+)")  # a Path has lost one slash
CHANGES = ("etag", "ETag", "generation", "md5Hash", "created")  # what tells apart versions of an object
ORIGIN = ".location"  # in a download's folder: its URL
UPLOADED = ".uploaded.json"  # in the folder of a mirror: {name: time and size of a file when it was the store's}


def url(text: str | os.PathLike) -> str | None:
    """Returns the URL of a place in an object store, without a slash at its end, or None for anything else."""
    match = URL.fullmatch(os.fspath(text).rstrip("/"))
    return match and f"{match[1]}://{match[2]}"


def filesystem(place: str) -> Any:
    """Returns fsspec's file system of a URL. Raises UserError if its package is not installed."""
    import fsspec  # slow to import

    package, extra = PACKAGES[place.partition(":")[0]]
    try:
        return fsspec.url_to_fs(place)[0]
    except ImportError as error:
        raise UserError(f"{place} needs the package {package}: pip install 'lavie_jax[{extra}]'") from error


@contextlib.contextmanager
def one_line(place: str) -> Iterator[None]:
    """Turns errors of the store and the network in the block into a UserError about `place`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{place} cannot be used ({type(error).__name__}: {reason[:200]})") from error


@dataclasses.dataclass(frozen=True)
class Store:
    """The files below a URL, and the folder that they are downloaded to, which belongs to these versions of them.

    Attributes:
        location: the URL.
        sizes: {name below the URL: bytes} of each file, sorted.
        folder: where downloaded files are.
    """

    location: str
    sizes: Mapping[str, int]
    folder: Path

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files, sorted."""
        return tuple(self.sizes)

    @classmethod
    def open(cls, place: str) -> "Store":
        """Lists the files below a URL. Raises UserError if there are none, or the store cannot be read."""
        with one_line(place):
            system = filesystem(place)
            system.invalidate_cache()
            found: Mapping[str, Mapping] = system.find(place, detail=True)
            root = system._strip_protocol(place).rstrip("/") + "/"
        inside = {name.removeprefix(root): info for name, info in found.items() if name.startswith(root)}
        files = {
            name: info for name, info in inside.items() if not name.endswith("/")
        }  # a folder made by a web console
        if not files:
            raise UserError(f"{place} does not exist, or contains no files")
        versions = [(name, info["size"], *(str(info.get(key)) for key in CHANGES)) for name, info in files.items()]
        digest = hashlib.sha256(json.dumps([place, sorted(versions)]).encode()).hexdigest()
        sizes = {name: files[name]["size"] for name in sorted(files)}
        return cls(place, sizes, cache_folder("remote") / digest[:32])

    def missing(self, files: Iterable[str]) -> list[str]:
        """Returns those of `files` that the folder lacks, sorted."""
        return sorted(name for name in set(files) if not self._is_complete(self.folder / name, name))

    def download(self, files: Iterable[str], *, workers: int = 1, progress: bool = False) -> Path:
        """Returns the folder after downloading those of `files` that it lacks; each appears when it is complete.

        Args:
            files: names of `self.files`.
            workers: number of downloads at the same time.
            progress: whether to show a bar of the bytes.
        """
        missing = self.missing(files)
        total = sum(self.sizes[name] for name in missing)
        bar = tqdm(desc=self.location, total=total, unit="B", unit_scale=True, disable=not (progress and missing))
        with one_line(self.location), bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            system = filesystem(self.location)
            for name in pool.map(lambda name: self._fetch(system, name), missing):
                bar.update(self.sizes[name])
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ORIGIN).write_text(self.location)
        return self.folder

    def _is_complete(self, file: Path, name: str) -> bool:
        return file.is_file() and file.stat().st_size == self.sizes[name]

    def _fetch(self, system: Any, name: str) -> str:
        """Downloads a file, and returns its name. Raises UserError if it has another size than in the listing."""
        with new_file(self.folder / name) as partial:
            system.get_file(f"{self.location}/{name}", str(partial))
            if not self._is_complete(partial, name):
                raise UserError(f"{self.location}/{name} was changed while it was downloaded: start again")
        return name


def origin(folder: Path) -> str | None:
    """Returns the URL that a folder was downloaded from, or None."""
    for top in (folder, folder.parent):
        if (top / ORIGIN).is_file():
            rest = folder.relative_to(top).as_posix()
            return (top / ORIGIN).read_text() + ("" if rest == "." else f"/{rest}")
    return None


@dataclasses.dataclass(frozen=True)
class Mirror:
    """A folder whose files are copied to a URL; `url` is None for a folder that is not.

    The folder of a URL is in the user's cache and stays there, so that an interrupted command resumes on this machine.
    """

    folder: Path
    url: str | None = None
    _uploaded: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, place: Path) -> "Mirror":
        """Returns the mirror of a URL, or the folder `place`. Raises UserError if the store cannot be used."""
        if (target := url(place)) is None:
            return cls(place)
        with one_line(target):
            filesystem(target).exists(target)
        return cls(cache_folder("out") / hashlib.sha256(target.encode()).hexdigest()[:32], target)

    def pull(self, stems: Iterable[str]) -> None:
        """Makes files whose names begin with one of `stems` those of the store.

        A file that the store lacks is deleted if it was there, and else waits for `push`, which may have failed.
        """
        if self.url is None:
            return
        stems = tuple(stems)
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads((self.folder / UPLOADED).read_text(encoding="utf-8"))
            self._uploaded.update({name: tuple(each) for name, each in stored.items()})
        with one_line(self.url):
            system = filesystem(self.url)
            system.invalidate_cache()
            root = system._strip_protocol(self.url).rstrip("/") + "/"
            found = {name.removeprefix(root): info["size"] for name, info in system.find(self.url, detail=True).items()}
            for name in [name for name in found if name.startswith(stems) and not name.endswith("/")]:
                target = self.folder / name
                # That of another request may have the same size if it is text.
                if not target.is_file() or target.stat().st_size != found[name] or target.suffix == ".json":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(f"{self.url}/{name}", str(target))
        for name, path in files_in(self.folder).items():
            if name in found:
                self._uploaded[name] = stamp(path)
            elif name.startswith(stems) and self._uploaded.get(name) == stamp(path):  # deleted in the store
                path.unlink()
        self._remember()

    def push(self, *, leave_out: str = "") -> None:
        """Uploads files that changed since the last time, but for those with the ending `leave_out`."""
        if self.url is None:
            return
        with one_line(self.url):
            system = filesystem(self.url)
            for name, path in files_in(self.folder).items():
                now = stamp(path)
                if self._uploaded.get(name) != now and not (leave_out and name.endswith(leave_out)):
                    system.put_file(str(path), f"{self.url}/{name}")
                    self._uploaded[name] = now
                    self._remember()

    def _remember(self) -> None:
        if self.folder.is_dir():
            with new_file(self.folder / UPLOADED) as temporary:
                temporary.write_text(json.dumps(self._uploaded), encoding="utf-8")


def files_in(folder: Path) -> dict[str, Path]:
    """Returns {relative name: path} of all files in a folder, but for hidden ones."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in found.items() if not any(p.startswith(".") for p in name.parts)}


def stamp(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is written: its time and size."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
