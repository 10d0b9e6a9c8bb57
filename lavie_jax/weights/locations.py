"""Where weights are: a folder, `hub:OWNER/NAME` on the Hugging Face hub, or a bucket, which are downloaded.

A bucket (`gs://BUCKET/PATH`, `s3://BUCKET/PATH`) contains a weights folder or a cascade of them. A repository on the
hub may also have originals: checkpoints of LaVie or SEINE, or an image model (Stable Diffusion 1.x, the x4-upscaler).
They are converted once, into ~/.cache/lavie_jax/hub. Only the files of the stages in question are downloaded.
"""

import os
import posixpath
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from absl import logging

from lavie_jax import remote
from lavie_jax.disk import cache_folder
from lavie_jax.errors import UserError, user_path
from lavie_jax.stages import STAGES
from lavie_jax.stages.stage import Stage
from lavie_jax.text_files import read_json
from lavie_jax.weights.convert import import_stage
from lavie_jax.weights.folder import CONTENTS, read_config
from lavie_jax.weights.hub.repository import HUB, Location, Repository, contents, entry, location_of
from lavie_jax.weights.inflate import inflate_pretrained
from lavie_jax.weights.originals import wanted
from lavie_jax.weights.reading import MODEL_FILES
from lavie_jax.weights.saving import write_json
from lavie_jax.weights.torch_files import import_torch

SOURCES = "sources.json"  # in a converted folder: the files and commits that it was made from
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def local_folder(location: str | os.PathLike, stages: Collection[str] | None = None) -> Path:
    """Returns the folder of a location, after downloading and converting it if necessary.

    Args:
        location: a path, which is returned with `~` expanded, `hub:OWNER/NAME[@REVISION][/FOLDER]`, or a URL of a
            folder in a bucket, `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`.
        stages: the stages of a cascade that are needed; None for all.

    Raises:
        UserError: the repository or bucket cannot be read (`Repository`, `Store`), or has no weights.
    """
    text = os.fspath(location)
    if place := remote.url(text):
        store = remote.Store.open(place)
        if not (folders := _weights_folders(store, "")):
            raise UserError(
                f"{place} is not a weights folder: it has no config.json, nor have {', '.join(STAGES)} in it"
            )
        return store.download(_files(store, "", [name for name in folders if stages is None or name in ("", *stages)]))
    if not text.startswith(HUB):
        return user_path(location)
    place = Location.parse(text)
    repository = Repository.open(place)
    folders = _weights_folders(repository, place.path)
    if folders:
        needed = [name for name in folders if stages is None or name in ("", *stages)]
        top = repository.download(_files(repository, place.path, needed))
        return top / place.path
    return _originals(repository, place, stages)


def record(name: str, folder: Path) -> dict[str, str]:
    """Returns what a sample's JSON records of a weights folder: {name: its path, or its location with the commit}.

    For a converted folder, `NAME_image_model` is the location of the image model.
    """
    file = folder / SOURCES
    image = read_json(file).get("image_model") if file.is_file() else None
    return {name: str(location_of(folder) or remote.origin(folder) or folder)} | (
        {f"{name}_image_model": image} if image else {}
    )


# ---- weights folders ----


def _weights_folders(repository: Repository | remote.Store, path: str) -> list[str]:
    """Returns the weights folders at a path: "" is the path itself, others are names of stages in it."""
    names = {name: posixpath.join(path, name, "config.json") for name in ("", *STAGES)}
    there = {name: file for name, file in names.items() if file in repository.files}
    top = repository.download(there.values())
    found = [name for name, file in there.items() if "format_version" in read_json(top / file)]
    return [""] if "" in found else found


def _files(repository: Repository | remote.Store, path: str, folders: Iterable[str]) -> list[str]:
    """Returns the files of weights folders at a path, with the parts that they share with other folders."""
    files = []
    for name in folders:
        folder = posixpath.join(path, name)
        config = read_config(repository.download([posixpath.join(folder, "config.json")]) / folder)
        for part in CONTENTS[config["stage"]]:
            where = posixpath.normpath(posixpath.join(folder, config.get("parts", {}).get(part, part)))
            if not (inside := contents(repository.files, where)):
                raise UserError(f"{repository.location} is incomplete: {where} is missing")
            files += inside
    return files


# ---- originals ----


def _originals(repository: Repository, place: Location, stages: Collection[str] | None) -> Path:
    """Converts checkpoints or an image model into the cache, and returns the folder of the place there."""
    checkpoints = {
        stage: file
        for stage, own in STAGES.items()
        for file in repository.files
        if posixpath.basename(file) == own.original
    }
    image = not checkpoints and any(f"unet/{file}" in repository.files for file in MODEL_FILES["unet"])
    stage, _, more = place.path.partition("/")
    if not (checkpoints or image) or more or (stage and stage not in STAGES):
        shown = ", ".join(repository.files[:5]) or "nothing"
        names = ", ".join(own.original for own in STAGES.values())
        raise UserError(
            f"{place} has no weights: the repository contains {shown}{', ...' if repository.files[5:] else ''}; give "
            f"one with a weights folder (config.json), a checkpoint ({names}) or an image model of diffusers (unet/)"
        )
    top = entry(cache_folder("hub"), repository.location.repository, repository.location.revision)
    if image:
        return _inflate(repository, top)
    for name, file in checkpoints.items():
        if (stages is None or name in stages) and stage in ("", name) and not (top / name).is_dir():
            _import(repository, file, STAGES[name], top)
    return top / place.path


def _import(repository: Repository, file: str, stage: Stage, top: Path) -> None:
    """Converts a released checkpoint with the image model that it was trained from."""
    if file.endswith(PICKLED):
        import_torch()  # raises before gigabytes are downloaded
    models = Repository.open(Location.parse(f"{HUB}{stage.image_repository}"))
    others = [top / other for other in STAGES if (top / other).is_dir()]
    logging.warning("%s/%s is converted once, into %s", repository.location, file, top / stage.name)
    notes = import_stage(
        stage,
        top / stage.name,
        unet_file=repository.download([file]) / file,
        pretrained=models.download(wanted(list(models.files))),
        share=others[0] if others else None,
    )
    _finish(
        top / stage.name, notes, {"checkpoint": f"{repository.location}/{file}", "image_model": str(models.location)}
    )


def _inflate(repository: Repository, top: Path) -> Path:
    """Converts an image model to the stage that is inflated from it, unless that is done, and returns its folder."""
    unet = read_json(repository.download(["unet/config.json"]) / "unet/config.json")
    levels = unet.get("num_class_embeds") is not None
    starts = (stage for stage in STAGES.values() if stage.inflates is None)
    stage = next(stage for stage in starts if levels == (stage.low_res_schedule is not None))
    folder = top / stage.name
    if not folder.is_dir():
        logging.warning("%s is converted once, into %s", repository.location, folder)
        pretrained = repository.download(wanted(list(repository.files), unet=True))
        notes = inflate_pretrained(stage, folder, pretrained=pretrained)
        _finish(folder, notes, {"image_model": str(repository.location)})
    logging.warning(
        "%s is an image model, whose temporal layers are untrained: train from it, or make images (--frames 1)",
        repository.location,
    )
    return folder


def _finish(folder: Path, notes: Iterable[str], made_from: Mapping[str, str]) -> None:
    """Logs what the converter chose, and records the files that a converted folder was made from."""
    for note in notes:
        logging.info("%s", note)
    write_json(folder / SOURCES, made_from)
