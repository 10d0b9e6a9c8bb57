"""Text to video through the stages of LaVie (arXiv 2309.15103):

    base            prompt                        -> key frames                   base.py            sec. 3.1
    interpolation   prompt + key frames           -> 4 (K - 1) + 1 frames         interpolation.py   sec. 3.3
    vsr             prompt + low-resolution clip  -> the clip at 4 times the size vsr.py             sec. 3.4

Every stage goes the same way (`running.py`): `prepare` makes what the UNet sees besides noise, `denoising.py` walks
from noise to latents in `windows.py`'s windows, `model.py` decodes them, `finish` crops. What goes into a UNet is in
`stages.py`, the maths of a step in `diffusion/`, settings and files in `samples/`.

`Cascade` is what a user holds. One stage's weights are on the devices at a time, and all samples go through a stage
before the next one begins. A sample depends on its prompt, its seed and the settings alone: its noise is keyed by the
seed, and neither the batch nor the number of devices shows in it.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import UInt8

import lavie_jax
from lavie_jax import parallel
from lavie_jax.cascade.model import StageModel
from lavie_jax.cascade.pixels import padding_note
from lavie_jax.cascade.running import PASSES, Job, Request, run_stage
from lavie_jax.data import tokens
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import UserError
from lavie_jax.samples.prompts import check_seed
from lavie_jax.samples.settings import STAGES, Settings, Source, parse_stages
from lavie_jax.samples.shelf import Memory
from lavie_jax.weights import Weights, load_folder

SHIPPED = Path(__file__).parents[1] / "assets"


# ---- weights ----


def load(
    path: str | os.PathLike | None = None,
    *,
    stages: Sequence[str] | None = None,
    folders: Mapping[str, str | os.PathLike] | None = None,
    dtype: DTypeLike | None = None,
    devices: Sequence[jax.Device] | None = None,
    fsdp: int = 1,
) -> "Cascade":
    """The stages in a weights folder, ready to sample.

    Args:
        path: one stage's folder, or a cascade's with some of `base/ interpolation/ vsr/`. Without it and `folders`,
            the small cascade that is shipped.
        stages: those to load; default: all that there are.
        folders: {stage: folder} of stages whose weights are elsewhere.
        dtype: of parameters and computation. Default: `default_dtype`.
        devices: to spread samples and windows over. Default: all of this process.
        fsdp: over how many of them each weight is split, for models that are too large for one device.

    Raises:
        UserError: a folder is missing, incomplete, damaged or of another stage, or there is none of a stage; `fsdp`
            does not divide the devices.
    """
    _mesh(devices, fsdp)  # refused before anything is read
    found = stage_folders(path, folders, stages)
    for stage in stages or ():
        if stage not in found:
            raise _no_weights(stage, found)
    weights = {stage: load_folder(found[stage], stage=stage) for stage in stages or found}
    return Cascade(weights, dtype=dtype, devices=devices, fsdp=fsdp)


def _mesh(devices: Sequence[jax.Device] | None, fsdp: int) -> Mesh:
    return parallel.make_mesh(fsdp=fsdp, devices=jax.local_devices() if devices is None else devices)


def stage_folders(
    path: str | os.PathLike | None = None,
    folders: Mapping[str, str | os.PathLike] | None = None,
    stages: Sequence[str] | None = None,
) -> dict[str, Path]:
    """{stage: its folder} of what a weights folder holds, with `folders` in their place; see `load`.

    A folder of one stage is taken to be of the one stage that is wanted, whatever it is: loading it will tell.
    """
    path = SHIPPED if path is None and not folders else path
    found = {}
    if path is not None:
        path = Path(path)
        found = {stage: path / stage for stage in STAGES if (path / stage / "config.json").exists()}
        if path == SHIPPED and not found:
            raise UserError(f"no model is shipped in {path} yet: give a weights folder with --weights")
        if (path / "config.json").exists() or not found:
            stage = stages[0] if stages and len(stages) == 1 else load_folder(path, params=False).stage
            if stage not in STAGES:
                raise UserError(f"{path} holds a {stage}, which makes no videos by itself; {', '.join(STAGES)} do")
            found = {stage: path}
    found |= {stage: Path(folder) for stage, folder in (folders or {}).items()}
    return {stage: found[stage] for stage in STAGES if stage in found}


def _no_weights(stage: str, there: Iterable[str]) -> UserError:
    has = ", ".join(there) or "none"
    return UserError(f"stage {stage} has no weights, there are those of: {has}; give --{stage}-weights")


def base_folder(path: str | os.PathLike) -> Path:
    """The base stage's own folder: `path`, or `path/base` where `path` holds a cascade."""
    nested = Path(path) / "base"
    return nested if not (Path(path) / "config.json").exists() and nested.is_dir() else Path(path)


def default_dtype(devices: Sequence[jax.Device]) -> DTypeLike:
    """float32 on a CPU, where bfloat16 is slower, bfloat16 elsewhere."""
    return jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16


# ---- what is asked for ----


def plan(
    weights: Mapping[str, Weights],
    stages: Sequence[str],
    given: Mapping[str, Mapping[str, Any]],
    source: Source | None = None,
) -> dict[str, Settings]:
    """{stage: its settings}, each stage's clip being the source of the next; the first one's is `source`, or none.

    `given` holds for each stage what shall differ from the settings that come with its weights.

    Raises:
        UserError: a stage without weights, a setting of a stage that is not run, that is out of range or that its
            model cannot make, or a clip that is longer than memory allows.
    """
    for stage, values in given.items():
        if stage not in stages and (name := next((n for n, v in values.items() if v is not None), None)):
            raise UserError(f"{name} is given for {stage}, which is not among the stages to run: {','.join(stages)}")
    settings = {}
    for stage in stages:
        if stage not in weights:
            raise _no_weights(stage, weights)
        try:
            settings[stage] = made = PASSES[stage].resolve(weights[stage], given.get(stage, {}), source)
            make_sampler(made.sampler, made.steps, weights[stage].schedule)
        except UserError as error:
            raise error if stage == "base" else UserError(f"{stage} stage: {error}") from None
        source = Source(frames=made.frames, height=made.height, width=made.width, fps=made.fps)
    return settings


def notes(weights: Mapping[str, Weights], settings: Mapping[str, Settings], source: Source | None) -> list[str]:
    """Lines about clips whose sides are padded on their way through the stages."""
    lines = []
    for stage, made in settings.items():
        if stage != "base":
            lines.append(padding_note(stage, source, PASSES[stage].multiple(weights[stage])))
        source = Source(frames=made.frames, height=made.height, width=made.width, fps=made.fps)
    return [line for line in lines if line]


class Cascade:
    """Prompts to videos, through the stages whose weights it has."""

    def __init__(
        self,
        weights: Mapping[str, Weights],
        *,
        dtype: DTypeLike | None = None,
        devices: Sequence[jax.Device] | None = None,
        fsdp: int = 1,
    ):
        """From weights that are loaded, {stage: weights}; `dtype`, `devices` and `fsdp` as in `load`."""
        self.weights = dict(weights)
        self.mesh = _mesh(devices, fsdp)
        self.devices = list(self.mesh.devices.flat)
        self.dtype = jnp.dtype(dtype or default_dtype(self.devices))
        self._model = None

    def model(self, stage: str) -> StageModel:
        """A stage on the devices, in the place of the one before: small devices hold one."""
        if self._model is None or self._model.weights.stage != stage:
            self._model = None
            self._model = StageModel(self.weights[stage], dtype=self.dtype, mesh=self.mesh)
        return self._model

    @property
    def base(self) -> StageModel:
        """The base stage on the devices."""
        return self.model("base")

    def made_with(self) -> dict[str, str]:
        """Versions, precision and hardware, for the record."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
        return {
            "lavie_jax": lavie_jax.__version__,
            "python": platform.python_version(),
            **versions,
            "dtype": self.dtype.name,
            "device": self.devices[0].device_kind,
        }

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        stages: str | Sequence[str] = ("base",),
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float | None = None,
        interpolation: Mapping[str, Any] | None = None,
        vsr: Mapping[str, Any] | None = None,
        clip: UInt8[np.ndarray, "frames h w 3"] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> UInt8[np.ndarray, "b t H W 3"]:
        """Videos, (B, T, H, W, 3) uint8. What is not given is as in the weights' config.json.

        `prompt`, `seed` and `negative_prompt` are one for all, or one for each of B samples. The settings by name
        are the base stage's; those of the others are mappings: `vsr={"steps": 20, "noise_level": 30}`, see
        `samples.settings`. Without base among the `stages`, the first one starts from `clip`. `frames` = 1 makes
        images, by the joint model's image path, without temporal attention. `batch_size` samples are denoised
        together by the base stage (see `videos`).

        Raises:
            UserError: a setting that is out of range or that this model cannot make; lists of different lengths;
                stages in an impossible order or without weights.
        """
        stages = parse_stages(stages, own_clip=clip is not None)
        given = {
            "base": dict(
                frames=frames, height=height, width=width, sampler=sampler, steps=steps, guidance=guidance,
                guidance_rescale=guidance_rescale,
            ),
            "interpolation": interpolation or {},
            "vsr": vsr or {},
        }  # fmt: skip
        source = None
        if clip is not None:
            _check_clip(clip)
            # its rate is not asked for: an array comes back without one
            source = Source(frames=len(clip), height=clip.shape[1], width=clip.shape[2], fps=24, own=True)
        settings = plan(self.weights, stages, given, source)
        if negative_prompt is not None and "base" not in stages:
            raise UserError(f'negative_prompt is the base stage\'s; for {stages[0]}: {{"negative_prompt": ...}}')
        requests = [
            Request(prompt=text, seed=check_seed(number), negative_prompt=other)
            for text, number, other in _aligned(prompt=prompt, seed=seed, negative_prompt=negative_prompt)
        ]
        for line in notes(self.weights, settings, source):
            logging.warning("%s", line)
        for stage, made in settings.items():
            tokenizer = tokens.load_tokenizer(self.weights[stage].tokenizer_dir)
            for line in text_warnings(tokenizer, [r.prompt + made.prompt_suffix for r in requests]):
                logging.warning("%s", line)
        return np.stack(list(self.videos(requests, settings, clip=clip, batch_size=batch_size, progress=progress)))

    def videos(
        self,
        requests: Sequence[Request],
        settings: Mapping[str, Settings],
        *,
        clip: UInt8[np.ndarray, "frames h w 3"] | None = None,
        shelves: Sequence[Memory] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """The requested videos in order, as the last of the stages in `settings` (`plan`) makes them.

        `shelves`, one for each request, keep what the stages make, and what is on them already is not made again.
        `batch_size`, rounded up to a multiple of the devices, is how many samples of the base stage are denoised
        together; the default is one a device. `progress` shows a bar for each stage.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: at least 1 is needed, given {batch_size}")
        jobs = [Job(request, shelf, clip) for request, shelf in zip(requests, shelves or [Memory() for _ in requests])]
        *first, last = settings
        for number, stage in enumerate(first, start=1):
            later = list(settings)[number:]
            for job in jobs:  # what comes after it may be on the shelf already
                job.needed = all(job.shelf.get(name) is None for name in later)
            for job, _ in zip(jobs, self._stage(stage, jobs, settings[stage], batch_size, progress)):
                job.before = stage
        for job in jobs:
            job.needed = True
        yield from self._stage(last, jobs, settings[last], batch_size, progress)

    def _stage(
        self, stage: str, jobs: Sequence[Job], settings: Settings, batch_size: int | None, progress: bool
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"] | None]:
        """One stage of every job, in order: from its shelf, or made now; None where it is not needed."""
        todo = [job for job in jobs if job.needed and job.shelf.get(stage) is None]
        made = run_stage(self.model(stage), settings, todo, batch_size, progress) if todo else iter(())
        for job in jobs:
            yield next(made) if job in todo else job.shelf.get(stage)


# ---- texts ----


def _check_clip(clip: np.ndarray) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
        raise UserError(f"clip: uint8 of shape (frames, H, W, 3) is needed, given {clip.dtype} of {clip.shape}")


def text_warnings(tokenizer, texts: Iterable[str]) -> list[str]:
    """Lines about what of `texts` the model will not see.

    These are ends of texts beyond its context, and words that a small model does not know.
    """
    texts = dict.fromkeys(texts)
    length = tokens.context_length(tokenizer)
    lines = [
        f"a prompt is longer than the model's {length} tokens, its end is cut: {lost!r}"
        for text in texts
        if (lost := tokens.lost_text(tokenizer, text))
    ]
    if unknown := dict.fromkeys(word for text in texts for word in tokens.unknown_words(tokenizer, text)):
        known = ", ".join(tokens.known_words(tokenizer))
        lines.append(f"this small model does not know, and leaves out: {', '.join(unknown)}. It knows: {known}")
    return lines


def _aligned(**values: object) -> Iterable[tuple]:
    """One tuple for each sample: lists as they are, single values repeated."""
    many = {n: v for n, v in values.items() if isinstance(v, Sequence | np.ndarray) and not isinstance(v, str)}
    lists = {n: list(v) for n, v in many.items()}
    lengths = {n: len(v) for n, v in lists.items()}
    count = max(lengths.values(), default=1)
    if 0 in lengths.values() or any(n != count for n in lengths.values()):
        raise UserError(f"lists of one length, at least 1, are needed; given {lengths}")
    return zip(*(lists.get(n, [v] * count) for n, v in values.items()))
