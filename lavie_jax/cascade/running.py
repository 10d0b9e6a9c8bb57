"""Runs one stage for many samples: prepare, denoise, decode, finish. Resumes the work of an interrupted run."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm.auto import tqdm

from lavie_jax.cascade.denoising import Clip, DenoisingPlan, denoise
from lavie_jax.cascade.model import StageModel
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import UserError
from lavie_jax.samples.stage_cache import MemoryCache
from lavie_jax.stages.settings import Settings
from lavie_jax.stages.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A sample to generate. `negative_prompt` replaces the setting of the main stage."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


@dataclasses.dataclass(eq=False)
class Sample:
    """One sample in progress.

    Attributes:
        request: the prompt, seed and negative prompt.
        cache: stores the stages' frames and states.
        clip: the user's clip to start from, if any.
        previous: the stage whose output the next one starts from; None for the user's clip.
        needed: whether the current stage has to be run for it.
    """

    request: Request
    cache: MemoryCache
    clip: UInt8[np.ndarray, "t h w 3"] | None
    previous: str | None = None
    needed: bool = True

    @property
    def source(self) -> UInt8[np.ndarray, "t h w 3"] | None:
        """The frames that the next stage starts from. They are reopened on each access, to keep few files open."""
        return self.clip if self.previous is None else self.cache.get(self.previous)


def run_stage(
    model: StageModel, settings: Settings, samples: Sequence[Sample], batch_size: int | None, progress: bool
) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
    """Yields the stage's frames of every sample, in order, each as soon as it is in its cache."""
    stage, devices = model.stage, model.mesh.size
    rows = devices
    if stage.batched:
        rows = min(math.ceil(n / devices) * devices for n in (batch_size or devices, len(samples)))
    plan = DenoisingPlan(
        sampler=make_sampler(settings.sampler, settings.steps, model.weights.schedule, settings.spacing),
        guidance=settings.guidance,
        rescale=settings.guidance_rescale,
        windows=stage.windows(stage.latent_shape(model.weights, settings), settings),
        rows=rows,
        image=stage.is_image(settings),
    )
    count = len(plan.windows)
    group_size = max(1, rows // count)
    bar = tqdm(
        total=len(samples) * plan.sampler.evaluations * count, unit="step" if count == 1 else "window",
        desc=f"{stage.name}: compiling", disable=not progress,
    )  # fmt: skip

    def on_window():
        bar.set_description(f"{stage.name}: denoising", refresh=False)
        bar.update()

    with bar:
        for start in range(0, len(samples), group_size):
            group = samples[start : start + group_size]
            with _memory_advice(stage):
                clips = _prepared(model, settings, group)
                bar.update(count * sum(clip.step for clip in clips))
                denoise(model, clips, plan, on_window)
            for clip, sample in zip(clips, group):
                with _memory_advice(stage):
                    pieces = _decoded(model, settings, clip.state["x"], sample.source, progress)
                    shape = (settings.frames, settings.height, settings.width, 3)
                    frames = sample.cache.put(stage.name, shape, pieces)
                yield frames


def _prepared(model: StageModel, settings: Settings, samples: Sequence[Sample]) -> list[Clip]:
    """Returns the samples' clips, restored to the step at which an interrupted run stopped."""
    stage, clips = model.stage, []
    shape = stage.latent_shape(model.weights, settings)
    for sample in samples:
        seed, own = sample.request.seed, sample.request.negative_prompt
        negative = own if stage.info.main and own is not None else settings.negative_prompt
        prompts = model.encode_text([sample.request.prompt + settings.prompt_suffix, negative])
        text, null_text = (jax.tree.map(lambda x, row=row: x[row], prompts) for row in range(2))
        concat, noise_level = stage.prepare(model, settings, seed, sample.source)

        def noise(stream: int, frames: range, seed: int = seed):
            return stage.noise(model, seed, stream, frames, shape)

        clip = Clip(
            text=text, null_text=null_text, shape=shape, noise=noise, concat=concat, noise_level=noise_level,
            save=functools.partial(sample.cache.save_state, stage.name),
        )  # fmt: skip
        if saved := sample.cache.load_state(stage.name):
            clip.step, clip.state = saved
        clips.append(clip)
    return clips


def _decoded(
    model: StageModel,
    settings: Settings,
    latents: np.ndarray,
    source: UInt8[np.ndarray, "t h w 3"] | None,
    progress: bool,
) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
    """Yields the stage's output, decoded from latents a few frames at a time."""
    stage, start = model.stage, 0
    desc = f"{stage.name}: decoding"
    with tqdm(total=len(latents), unit="frame", desc=desc, leave=False, disable=not progress) as bar:
        for frames in model.decode(latents):
            yield stage.finish(frames, start, settings, source)
            start += len(frames)
            bar.update(len(frames))


@contextlib.contextmanager
def _memory_advice(stage: Stage):
    """Turns device out-of-memory errors into a UserError with advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has too little memory for the stage {stage.name}: use {stage.memory_advice}"
        ) from error
