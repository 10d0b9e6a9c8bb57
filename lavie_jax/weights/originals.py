"""The files that others published, brought to where they can be converted, and checked.

A place is a path, or, on the Hugging Face hub, `hub:OWNER/NAME` for an image model and `hub:OWNER/NAME/FILE` for a
file; `hub:OWNER/NAME@REVISION` names a branch, a tag or a commit. Of an image model only what conversion reads is
downloaded, which leaves out its UNet. A download that was stopped goes on where it was.
"""

import hashlib
import re
import shutil
from pathlib import Path

from lavie_jax.errors import UserError
from lavie_jax.models.registry import PARTS
from lavie_jax.weights.pretrained import MODEL_FILES

HUB = "hub:"
PLACE = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
SMALL_FILES = re.compile(r"(tokenizer|scheduler|low_res_scheduler)/[^/]+|(unet|vae|text_encoder)/config\.json")


def get(place: str, downloads: str | Path, *, sha256: str = "") -> Path:
    """The file or folder at `place`, if need be downloaded into `downloads`.

    `sha256`, if given, is the file's hash in hex; of a folder, lines or a comma-separated list of what the command
    sha256sum writes, `HASH NAME`, for any of its files. Raises UserError when there is nothing at `place`, when the hub
    does not give it, or when a hash is another.
    """
    path = _from_hub(place, Path(downloads)) if place.startswith(HUB) else Path(place).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; give a path, or {HUB}OWNER/NAME of an image model on the hub")
    check_sha256(path, sha256)
    return path


def discard(place: str, downloads: str | Path) -> None:
    """Remove an original that is converted: a file, or what was downloaded. A folder of the user's stays."""
    if place.startswith(HUB):
        shutil.rmtree(_folder(_parsed(place), Path(downloads)), ignore_errors=True)
    elif Path(place).expanduser().is_file():
        Path(place).expanduser().unlink()


def check_sha256(path: Path, given: str) -> None:
    """UserError when a file is not what its hash says, or the hashes given cannot be those of `path`; see `get`."""
    for line in filter(None, map(str.strip, re.split(r"[,\n]", given))):
        wanted, _, name = line.partition(" ")
        name = name.strip().removeprefix("*")  # sha256sum marks what it read as binary
        file = path / name if name else path
        if not re.fullmatch("[0-9a-fA-F]{64}", wanted):
            raise UserError(f"SHA-256 of {file}: 64 hexadecimal digits are needed, given {wanted!r}")
        if not file.is_file():
            hint = "give HASH NAME of files in it" if file.is_dir() else "there is no such file"
            raise UserError(f"SHA-256 of {file}: it cannot be checked: {hint}")
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != wanted.lower():
            raise UserError(f"{file} is damaged, or another file: its SHA-256 is {found}, given was {wanted.lower()}")


def _parsed(place: str) -> re.Match:
    match = PLACE.fullmatch(place)
    if match is None:
        raise UserError(f"{place!r} is no place on the hub: {HUB}OWNER/NAME, or {HUB}OWNER/NAME/FILE, is needed")
    return match


def _folder(match: re.Match, downloads: Path) -> Path:
    """Where what comes from a repository is kept."""
    return downloads / "--".join([*match["repository"].split("/"), *([match["revision"]] if match["revision"] else [])])


def _from_hub(place: str, downloads: Path) -> Path:
    import huggingface_hub  # comes with transformers; slow to import

    match = _parsed(place)
    folder = _folder(match, downloads)
    where = {"repo_id": match["repository"], "revision": match["revision"]}
    try:
        if match["file"]:
            return Path(huggingface_hub.hf_hub_download(filename=match["file"], local_dir=folder, **where))
        files = wanted(huggingface_hub.HfApi().list_repo_files(**where))
        huggingface_hub.snapshot_download(allow_patterns=files, local_dir=folder, **where)
    except Exception as error:  # of the hub, the network or the disk, and each library below has its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{place} cannot be downloaded: {reason}") from error
    return folder


def wanted(files: list[str]) -> list[str]:
    """Those of an image model's files that conversion reads: the best file of each part but the UNet, and what is
    small."""
    there = set(files)
    best = [
        next((name for file in MODEL_FILES[part] if (name := f"{part}/{file}") in there), None)
        for part in PARTS
        if part != "unet"  # the video model brings its own
    ]
    return sorted(filter(None, best)) + sorted(name for name in files if SMALL_FILES.fullmatch(name))
