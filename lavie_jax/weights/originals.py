"""Downloads published checkpoints for conversion and checks their hashes.

A location is a path, or, on the Hugging Face hub, `hub:OWNER/NAME` for an image model and `hub:OWNER/NAME/FILE` for a
file (`hub/repository.py`). Only the files of an image model that conversion reads are downloaded, which excludes its
UNet. Interrupted downloads resume.
"""

import re
import shutil
from pathlib import Path

from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError, user_path
from lavie_jax.models.registry import PARTS
from lavie_jax.weights.hub.repository import HUB, Location, one_line
from lavie_jax.weights.reading import SHARD, candidates

SMALL_FILES = re.compile(r"(tokenizer|scheduler|low_res_scheduler)/[^/]+|(unet|vae|text_encoder)/config\.json")


def get(location: str, downloads: str | Path, *, sha256: str = "") -> Path:
    """Returns the path of a file or folder, after downloading it if necessary.

    Args:
        location: a path, or the hub's, see above.
        downloads: the folder to download to.
        sha256: the file's hash in hex; for a folder, the output of the command sha256sum for any of its files
            (`HASH NAME`), as lines or separated by commas. Empty for no check.

    Raises:
        UserError: there is nothing at `location`, the download fails, or a hash differs.
    """
    path = _from_hub(location, user_path(downloads)) if location.startswith(HUB) else user_path(location)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a path, or {HUB}OWNER/NAME for an image model on the hub")
    check_sha256(path, sha256)
    return path


def discard(location: str, downloads: str | Path) -> None:
    """Deletes a converted original: a file, or a download. Folders of the user are never deleted."""
    if location.startswith(HUB):
        shutil.rmtree(_folder(Location.parse(location), user_path(downloads)), ignore_errors=True)
    elif user_path(location).is_file():
        user_path(location).unlink()


def check_sha256(path: Path, given: str) -> None:
    """Raises UserError when a hash differs, or cannot belong to `path`; see `get`."""
    for line in filter(None, map(str.strip, re.split(r"[,\n]", given))):
        wanted, _, name = line.partition(" ")
        name = name.strip().removeprefix("*")  # sha256sum marks binary mode
        file = path / name if name else path
        if not re.fullmatch("[0-9a-fA-F]{64}", wanted):
            raise UserError(f"SHA-256 of {file} must have 64 hexadecimal digits, not {wanted!r}")
        if not file.is_file():
            hint = "is a folder; give HASH NAME of files in it" if file.is_dir() else "does not exist"
            raise UserError(f"the SHA-256 cannot be checked: {file} {hint}")
        actual = file_hash(file)
        if actual != wanted.lower():
            raise UserError(f"{file} is damaged or a different file: its SHA-256 is {actual}, not {wanted.lower()}")


def _folder(place: Location, downloads: Path) -> Path:
    """Returns the download folder of a repository."""
    return downloads / "--".join([*place.repository.split("/"), *([place.revision] if place.revision else [])])


def _from_hub(location: str, downloads: Path) -> Path:
    import huggingface_hub  # slow to import

    place = Location.parse(location)
    folder = _folder(place, downloads)
    where = {"repo_id": place.repository, "revision": place.revision}
    with one_line(place):
        if place.path:
            return Path(huggingface_hub.hf_hub_download(filename=place.path, local_dir=folder, **where))
        files = wanted(huggingface_hub.HfApi().list_repo_files(**where))
        huggingface_hub.snapshot_download(allow_patterns=files, local_dir=folder, **where)
    return folder


def wanted(files: list[str], *, unet: bool = False) -> list[str]:
    """Selects the files of an image model that conversion reads: the best of each part, and small ones.

    A released video model has its own UNet, so that the image model's is left out unless `unet`.
    """
    available, best = set(files), []
    for part in PARTS:
        name = next((name for file in candidates(part) if (name := f"{part}/{file}") in available), None)
        if name is None or (part == "unet" and not unet):
            continue
        best.append(name)
        if name.endswith(".json"):  # the index of a sharded model
            best += [shard for shard in files if _is_shard(shard, name)]
    return sorted(best) + sorted(name for name in files if SMALL_FILES.fullmatch(name))


def _is_shard(name: str, index: str) -> bool:
    """Whether a file is a shard of the model with this index: in its folder, in its format and precision."""
    kinds = (".safetensors", ".bin", "fp16")
    same_kind = all((kind in name) == (kind in index) for kind in kinds)
    return SHARD.fullmatch(name) is not None and Path(name).parent == Path(index).parent and same_kind
