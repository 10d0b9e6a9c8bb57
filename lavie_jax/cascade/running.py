"""One stage for many samples: prepare, denoise, decode, finish, with what a killed run left taken up again."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm.auto import tqdm

from lavie_jax.cascade import base, interpolation, vsr
from lavie_jax.cascade.denoising import Clip, DenoisingPlan, denoise
from lavie_jax.cascade.model import StageModel
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import UserError
from lavie_jax.samples.settings import Settings
from lavie_jax.samples.shelf import Memory

PASSES = {"base": base, "interpolation": interpolation, "vsr": vsr}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to make. `negative_prompt` is for the base stage, in place of its settings'."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """One sample in work: the user's clip, where results are kept, and the stage that is done (`before`)."""

    request: Request
    shelf: Memory
    clip: UInt8[np.ndarray, "t h w 3"] | None
    before: str | None = None
    needed: bool = True

    @property
    def source(self) -> UInt8[np.ndarray, "t h w 3"] | None:
        """What the next stage starts from. Not kept open: a system gives a process a few hundred files."""
        return self.clip if self.before is None else self.shelf.get(self.before)


def run_stage(
    model: StageModel, settings: Settings, jobs: Sequence[Job], batch_size: int | None, progress: bool
) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
    """The stage's frames of every job, in order, each as soon as it is on its shelf."""
    stage = model.weights.stage
    passes, ways = PASSES[stage], model.mesh.size
    rows = ways
    if stage == "base":  # its windows are few and small: more than one a device may be wanted
        rows = min(math.ceil(n / ways) * ways for n in (batch_size or ways, len(jobs)))
    plan = DenoisingPlan(
        sampler=make_sampler(settings.sampler, settings.steps, model.weights.schedule),
        guidance=settings.guidance,
        rescale=settings.guidance_rescale,
        windows=passes.windows(passes.latent_shape(model.weights, settings), settings),
        rows=rows,
        image=stage == "base" and settings.frames == 1,
    )
    count = len(plan.windows)
    together = max(1, rows // count)
    bar = tqdm(
        total=len(jobs) * plan.sampler.evaluations * count, unit="step" if count == 1 else "window",
        desc=f"{stage}: compiling", disable=not progress,
    )  # fmt: skip

    def on_window():
        bar.set_description(f"{stage}: denoising", refresh=False)
        bar.update()

    with bar:
        for start in range(0, len(jobs), together):
            group = jobs[start : start + together]
            with _memory_in_words(stage):
                clips = _prepared(model, settings, group)
                bar.update(count * sum(clip.step for clip in clips))
                denoise(model, clips, plan, on_window)
            for clip, job in zip(clips, group):
                with _memory_in_words(stage):
                    frames = _decoded(model, settings, clip.state["x"], job.source, progress)
                    made = job.shelf.put(stage, (settings.frames, settings.height, settings.width, 3), frames)
                yield made


def _prepared(model: StageModel, settings: Settings, jobs: Sequence[Job]) -> list[Clip]:
    """The jobs' clips, at the step where the run before stopped."""
    stage, clips = model.weights.stage, []
    for job in jobs:
        own = job.request.negative_prompt if stage == "base" else None
        negative = settings.negative_prompt if own is None else own
        text, null_text = model.encode_text([job.request.prompt + settings.prompt_suffix, negative])
        clip = PASSES[stage].prepare(model, settings, job.request.seed, text, null_text, job.source)
        if saved := job.shelf.load_state(stage):
            clip.step, clip.state = saved
        clip.save = functools.partial(job.shelf.save_state, stage)
        clips.append(clip)
    return clips


def _decoded(
    model: StageModel,
    settings: Settings,
    latents: np.ndarray,
    source: UInt8[np.ndarray, "t h w 3"] | None,
    progress: bool,
) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
    """Frames of latents as they leave the stage, a few at a time."""
    stage, start = model.weights.stage, 0
    with tqdm(total=len(latents), unit="frame", desc=f"{stage}: decoding", leave=False, disable=not progress) as bar:
        for made in model.decode(latents):
            yield PASSES[stage].finish(made, start, settings, source)
            start += len(made)
            bar.update(len(made))


@contextlib.contextmanager
def _memory_in_words(stage: str):
    """A device that is out of memory is for the user to know, not a fault of the program."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        ways_out = {
            "base": "a smaller batch size, fewer frames, or a smaller height and width",
            "interpolation": "a clip of a smaller height and width",
            "vsr": "smaller windows: a smaller tile, or fewer window frames",
        }
        raise UserError(f"the device has too little memory for the stage {stage}: take {ways_out[stage]}") from error
