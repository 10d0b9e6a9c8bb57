"""Files of samples: `OUT/{index:04d}-{slug}-{seed}.mp4`, each with a JSON file that records how to reproduce it.

The JSON's `request` determines the sample, and `made_with` records versions and hardware. Existing samples are
skipped, and a sample of another request is only replaced with --overwrite. Contact sheets are in `sheets.py`.
"""

import dataclasses
import json
import os
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lavie_jax.data.video_files import FORMATS, read_video, save_as
from lavie_jax.disk import process_name
from lavie_jax.errors import UserError, suggest, user_path
from lavie_jax.samples.prompt_syntax import AS_IS, Reading
from lavie_jax.samples.provenance import GENERATED, describe
from lavie_jax.samples.signing import Certificate
from lavie_jax.samples.stage_cache import StageCache
from lavie_jax.stages.settings import STAGE_INFO, Settings, complete

SIDECAR_VERSION = 1
STAGES_FOLDER = "stages"


def save_video(
    video: UInt8[np.ndarray, "1 t h w 3"] | UInt8[np.ndarray, "t h w 3"],
    path: str | os.PathLike,
    *,
    fps: float,
    certificate: Certificate | None = None,
) -> Path:
    """Writes one video, as a `Cascade` returns it or (T, H, W, 3), in the format of the path's ending.

    Files except npz state that they are generated (`provenance.py`).

    Args:
        video: uint8 frames.
        path: ends in `.mp4`, `.gif`, `.npz` (lossless) or `.png` (lossless: a file for one frame, else a folder of
            that name without the ending).
        fps: frames per second.
        certificate: signs the file (`signing.py`), except npz.

    Returns:
        The path of the file or folder.

    Raises:
        UserError: another ending, or odd sides in an mp4.
    """
    path = user_path(path)
    if path.suffix[1:] not in FORMATS:
        raise UserError(f"{path}: unknown ending {path.suffix!r}{suggest(path.suffix[1:], FORMATS)}")
    saved = save_as(video.reshape(video.shape[-4:]), path.with_suffix(""), path.suffix[1:], fps=fps, metadata=GENERATED)
    if certificate is not None:
        certificate.sign(saved)
    return saved


def parse_formats(names: str) -> tuple[str, ...]:
    """Parses `"mp4,png"` to a tuple. Raises UserError for an unknown format, or if there is none."""
    formats = tuple(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    if not formats:
        raise UserError(f"format: none given. Allowed: {', '.join(FORMATS)}")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"format: unknown {name!r}{suggest(name, FORMATS)}")
    return formats


def check_formats(formats: tuple[str, ...], *, frames: int, height: int, width: int) -> None:
    """Raises UserError for an image in a video format, and for odd sides in an mp4."""
    films = [name for name in formats if name in ("mp4", "gif")]
    if frames == 1 and films:
        raise UserError(f"format: one frame is an image, and {films[0]} is a video format; use png or npz")
    if "mp4" in formats and (height % 2 or width % 2):
        raise UserError(f"format: the sides of an mp4 must be even, not {height}x{width}; use gif, png or npz")


def slug(text: str) -> str:
    """A short name of lower-case ASCII letters, digits and hyphens: `"A red circle!"` becomes `a-red-circle`."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:48].rstrip("-") or "prompt"


def make_request(
    prompt: str,
    seed: int,
    settings: Mapping[str, Settings],
    hashes: Mapping[str, str],
    *,
    negative_prompt: str | None = None,
    prompts_at: Mapping[int, str] | None = None,
    clip_hash: str | None = None,
    known_hashes: Mapping[int, str] | None = None,
    reading: Reading = AS_IS,
) -> dict[str, Any]:
    """Returns everything that determines a sample, as JSON values.

    `prompts_at` are several prompts over time, of which `prompt` is then the name. `reading` is how prompts are read.
    `settings` and `hashes` (of the weights) are {stage: ...}. The main stage's are entries of the
    request itself, as in a call and on the command line; another stage's are under its name. `known_hashes` are those
    of the pictures that are given as frames.
    """
    request = {"prompt": prompt, "seed": seed, "stages": list(settings), **reading.to_dict()}
    if clip_hash is not None:
        request["input_sha256"] = clip_hash
    if known_hashes:
        request["known_sha256"] = {str(frame): known_hashes[frame] for frame in sorted(known_hashes)}
    for stage, own in settings.items():
        values = {**own.to_dict(), "weights_sha256": hashes[stage]}
        request |= values if STAGE_INFO[stage].main else {stage: values}
    if negative_prompt is not None:
        request["negative_prompt"] = negative_prompt
    if prompts_at is not None:
        request["prompts_at"] = {str(frame): text for frame, text in prompts_at.items()}
    return request


def of_stage(request: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """The settings of one stage in a request."""
    return request if STAGE_INFO[stage].main else request[stage]


def up_to(request: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The part of a request that determines the output of one of its stages."""
    stages = request["stages"]
    later = stages[stages.index(stage) + 1 :]
    return {**{n: v for n, v in request.items() if n not in later}, "stages": stages[: stages.index(stage) + 1]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The files of one sample.

    Attributes:
        folder: the folder of the files.
        index: the index of the prompt.
        formats: the requested formats.
        request: everything that determines the sample (`make_request`).
        describe: whether files contain the request. They always state that they are generated.
        certificate: signs the files; None for none.
    """

    folder: Path
    index: int
    formats: tuple[str, ...]
    request: Mapping[str, Any]
    describe: bool = True
    certificate: Certificate | None = None

    @property
    def stem(self) -> str:
        """The file name without its ending: index, prompt, seed."""
        return f"{self.index:04d}-{slug(self.request['prompt'])}-{self.request['seed']}"

    @property
    def final(self) -> Mapping[str, Any]:
        """The settings of the last stage, which hold the size and rate of the output."""
        return of_stage(self.request, self.request["stages"][-1])

    def cache(self, dtype: str) -> StageCache:
        """The cache of the stages. If only the main stage is run, it is removed when the sample is finished."""
        stages = self.request["stages"]
        records = {stage: {**up_to(self.request, stage), "dtype": dtype} for stage in stages}
        only_main = len(stages) == 1 and STAGE_INFO[stages[0]].main
        return StageCache(self.folder / STAGES_FOLDER / self.stem, records, keep=not only_main)

    def path(self, ending: str) -> Path:
        """The file of a format, or the JSON. A video as PNGs is a folder."""
        if ending == "png" and self.final["frames"] > 1:
            return self.folder / self.stem
        return self.folder / f"{self.stem}.{ending}"

    def to_make(self, *, overwrite: bool) -> tuple[str, ...]:
        """Returns the formats that are still to be written; () if the sample exists.

        Raises UserError if a file of another request exists, unless `overwrite`.
        """
        if overwrite:
            return self.formats
        existing = [name for name in FORMATS if self.path(name).exists()]
        sidecar = self.path("json")
        if not sidecar.exists():
            if existing:
                raise UserError(
                    f"{self.path(existing[0])} exists without a JSON file that records how it was generated; "
                    "choose another --out, or --overwrite"
                )
            return self.formats
        stored = _read_request(sidecar)
        if stored is None:
            raise UserError(
                f"{sidecar} exists but does not record how a sample was generated; choose another --out, or --overwrite"
            )
        if (name := self._difference(stored)) is not None:
            raise UserError(
                f"{sidecar} was made with {name} = {json.dumps(stored.get(name))}, not "
                f"{json.dumps(self.request.get(name))} as requested now; choose another --out, or --overwrite"
            )
        return tuple(name for name in self.formats if name not in existing)

    def _difference(self, stored: Mapping[str, Any]) -> str | None:
        """The first field in which the request `stored` differs from this one."""
        names = sorted({*stored, *self.request})
        return next((name for name in names if stored.get(name) != self.request.get(name)), None)

    def write(
        self, video: UInt8[np.ndarray, "t h w 3"], formats: tuple[str, ...], made_with: Mapping[str, Any]
    ) -> list[Path]:
        """Writes the JSON and `formats` of a video; returns the paths of the latter.

        Every file is complete when its name appears. The JSON comes first: if a run is killed between the two, the
        next run recognises its own request and writes the missing formats.
        """
        sidecar = {"format_version": SIDECAR_VERSION, "request": dict(self.request), "made_with": dict(made_with)}
        text = json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n"
        part = self.folder / f".{process_name()}-{self.stem}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(part)  # a folder of a killed process: in a container, this one has its number
            if formats == self.formats or not self.path("json").exists():
                self._remove_outdated()
                part.write_text(text, encoding="utf-8")
                _replace(part, self.path("json"))
            metadata = describe(self.request, made_with.get("dtype")) if self.describe else GENERATED
            for name in formats:
                saved = save_as(video, part, name, fps=self.final["fps"], metadata=metadata)
                if self.certificate is not None:
                    self.certificate.sign(saved)
                _replace(saved, self.path(name))
        except OSError as error:
            raise UserError(f"out: cannot write {self.folder / self.stem}: {error.strerror or error}") from error
        finally:
            _remove(part)
        return [self.path(name) for name in formats]

    def _remove_outdated(self) -> None:
        """Removes all formats of another request, which `--overwrite` replaces.

        After a crash they would be mistaken for files of this request.
        """
        stored = _read_request(self.path("json")) if self.path("json").exists() else None
        if stored is None:  # unknown origin: keep formats that were not requested
            paths = [self.path(name) for name in self.formats]
        elif self._difference(stored) is None:
            paths = []
        else:
            paths = [self.folder / self.stem, *(self.folder / f"{self.stem}.{name}" for name in FORMATS)]
        for path in paths:
            _remove(path)

    def read(self) -> UInt8[np.ndarray, "t h w 3"]:
        """Reads the sample from the most accurate of its files. Raises UserError if it is damaged."""
        path = next(path for name in ("npz", "png", "mp4", "gif") if (path := self.path(name)).exists())
        try:
            if path.suffix == ".npz":
                with np.load(path) as arrays:
                    return arrays["video"]
            if path == self.path("png"):
                pages = sorted(path.glob("*.png")) if path.is_dir() else [path]
                return np.stack([np.asarray(Image.open(page).convert("RGB")) for page in pages])
            return read_video(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} cannot be read: delete it and run the same command to generate it again"
            ) from error


def _read_request(path: Path) -> dict[str, Any] | None:
    """Returns the request in a sample's JSON, or None."""
    try:
        request = json.loads(path.read_text(encoding="utf-8"))["request"]
    except (ValueError, KeyError, TypeError):
        return None
    return complete(request) if isinstance(request, dict) else None


def _replace(part: Path, path: Path) -> None:
    """Renames the finished file or folder `part`; `path` exists only under --overwrite."""
    if path.is_dir():
        _remove(path)
    os.replace(part, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
