"""Repositories of the Hugging Face hub: their locations, the list of their files, downloads, errors in one line.

`hub:OWNER/NAME` is a repository, `hub:OWNER/NAME/PATH` a file or folder in it. `hub:OWNER/NAME@REVISION` selects a
branch, a tag or a commit. Downloads are in the usual cache (`~/.cache/huggingface/hub`, or HF_HUB_CACHE), shared with
other programs. A file has its name there only when it is complete; interrupted downloads resume. Without a network,
what is in the cache is used.
"""

import contextlib
import dataclasses
import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import logging

from lavie_jax.errors import UserError

HUB = "hub:"
LOCATION = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<path>.+))?")
ENTRY = re.compile(
    r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})(/(?P<path>.+))?$"
)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclasses.dataclass(frozen=True)
class Location:
    """A place on the hub. A revision of None is the branch main; `path` is "" for the whole repository."""

    repository: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "Location":
        """Reads `hub:OWNER/NAME[@REVISION][/PATH]`. Raises UserError for anything else."""
        match = LOCATION.fullmatch(text.rstrip("/"))
        if match is None:
            raise UserError(f"{text!r} is not a location on the hub; give {HUB}OWNER/NAME or {HUB}OWNER/NAME/PATH")
        return cls(match["repository"], match["revision"], match["path"] or "")

    def __str__(self) -> str:
        revision, path = (sign + text if text else "" for sign, text in (("@", self.revision), ("/", self.path)))
        return f"{HUB}{self.repository}{revision}{path}"


def location_of(path: Path) -> Location | None:
    """Returns the location, with its commit, of a folder in a cache of the hub's layout; None for other folders."""
    match = ENTRY.search(path.as_posix())
    return match and Location(f"{match['owner']}/{match['name']}", match["revision"], match["path"] or "")


def entry(cache: Path, repository: str, commit: str) -> Path:
    """Returns the folder of a commit in a cache of the hub's layout, as `location_of` reads it."""
    return cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit


@dataclasses.dataclass(frozen=True)
class Repository:
    """A commit of a repository.

    Attributes:
        location: the repository, with the commit as its revision.
        files: the names of its files.
        asked: the branch, tag or commit that was asked for.
        offline: why the hub cannot be reached; `files` are then those in the cache. Otherwise "".
    """

    location: Location
    files: tuple[str, ...]
    asked: str
    offline: str = ""

    @classmethod
    def open(cls, location: Location) -> "Repository":
        """Lists the files of a repository at the location's revision, without its path.

        Raises:
            UserError: it does not exist, is gated, has no such revision, or can neither be reached nor is in the cache.
        """
        import huggingface_hub  # slow to import

        asked = location.revision or "main"
        with one_line(location):
            try:
                info = huggingface_hub.HfApi().model_info(location.repository, revision=location.revision)
            except Exception as error:
                if _is_network(error) and (cached := cls._from_cache(location, asked, error)) is not None:
                    return cached
                raise
        files = tuple(sorted(file.rfilename for file in info.siblings or ()))
        return cls(Location(location.repository, info.sha), files, asked)

    @classmethod
    def _from_cache(cls, location: Location, asked: str, error: Exception) -> "Repository | None":
        """The part of a repository that is in the cache, if any."""
        ref, commit = _ref(location.repository, asked), asked
        if not re.fullmatch("[0-9a-f]{40}", commit):
            commit = ref.read_text().strip() if ref.is_file() else ""
        folder = entry(_cache(), location.repository, commit)
        if not commit or not folder.is_dir():
            return None
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        logging.warning("%s: the hub cannot be reached; using the cache, commit %s", location, commit)
        return cls(Location(location.repository, commit), tuple(files), asked, _first_line(error))

    def download(self, files: Iterable[str]) -> Path:
        """Returns the folder of this commit in the cache, after downloading those of `files` that it lacks.

        Raises:
            UserError: access is denied, or a file is neither in the cache nor can be downloaded.
        """
        import huggingface_hub

        wanted = sorted(set(files))
        folder = entry(_cache(), self.location.repository, self.location.revision)
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            if self.offline:
                raise UserError(f"{self.location}/{missing[0]} is not in the cache, and {_unreachable(self.offline)}")
            with one_line(self.location):
                huggingface_hub.snapshot_download(
                    self.location.repository,
                    revision=self.location.revision,
                    allow_patterns=[glob.escape(name) for name in wanted],
                )
            self._remember()
        return folder

    def _remember(self) -> None:
        """Records the commit of a branch or tag in the cache, as the hub's tools do, for uses without a network."""
        ref = _ref(self.location.repository, self.asked)
        with contextlib.suppress(OSError):  # a cache that cannot be written
            if self.asked != self.location.revision:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.location.revision)


def _ref(repository: str, name: str) -> Path:
    """The file in the cache that holds the commit of a branch or tag."""
    return entry(_cache(), repository, "").parent / "refs" / name


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextlib.contextmanager
def one_line(location: Location) -> Iterator[None]:
    """Turns errors of the hub, the network and the disk in the block into a UserError about `location`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library below has its own types
        raise UserError(f"{location}: {_reason(location, error)}") from error


def _reason(location: Location, error: Exception) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{location.repository}"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its terms on {page}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: check the name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no branch, tag or commit {location.revision!r}: see {page}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        return _reason(location, error.__cause__)
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_network(error):
        return _unreachable(_first_line(error))
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository has no such file: see {page}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"a login is needed: {LOGIN}"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"access is denied ({_first_line(error)}): {LOGIN}"
    return (
        f"the hub refused it: {_first_line(error)}" if isinstance(error, errors.HfHubHTTPError) else _first_line(error)
    )


def _unreachable(reason: str) -> str:
    return f"the hub cannot be reached ({reason}): check the network, or copy the repository and give the folder"


def _is_network(error: BaseException) -> bool:
    """Whether the hub cannot be reached, is down or is switched off (HF_HUB_OFFLINE)."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    # the HTTP library differs between versions of huggingface_hub
    return bool({cls.__name__ for cls in type(error).__mro__} & {"TransportError", "ConnectionError"})


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def contents(files: Iterable[str], folder: str) -> list[str]:
    """Returns the names of the files below a folder of a repository, but for hidden ones."""
    prefix = f"{folder}/" if folder else ""
    inside = (name for name in files if name.startswith(prefix))
    return [name for name in inside if not any(part.startswith(".") for part in name.removeprefix(prefix).split("/"))]
