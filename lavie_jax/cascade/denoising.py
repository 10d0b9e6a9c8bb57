"""From noise to latents: clips walk down a sampler's steps, window by window, all windows spread over the devices.

One step of one clip: every window's prediction (`stages.denoiser`), their blend (`windows.py`), the sampler's step on
the whole clip (`diffusion/samplers.py`). A clip lives on the host, so that neither its length nor the number of its
windows shows in a device's memory, and so that its state can be saved between any two steps.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lavie_jax import parallel
from lavie_jax.cascade.model import ALL, BATCH, StageModel, one_ahead, per_device
from lavie_jax.diffusion import Sampler
from lavie_jax.stages.conditioning import Condition, denoiser
from lavie_jax.stages.windows import Window

TOGETHER_PLACES = 16 * 40 * 64  # latent places of a device's rows up to which both guided halves share one UNet call
SAVE_EVERY = 5  # steps between two saved states
STEP_PLACES = 8 * 320 * 512  # latent places whose sampler step is taken at a time

State = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class Clip:
    """One sample on its way from noise to latents.

    `noise(stream, frames)` draws the noise of some of its frames: stream 0 to start from, stream i + 1 for step i.
    `concat` and `noise_level` are its condition, `step` is the next step to take from `state`.
    """

    text: Float[np.ndarray, "l d"]
    null_text: Float[np.ndarray, "l d"]
    shape: tuple[int, int, int, int]  # of its latents (T, h, w, C)
    noise: Callable[[int, range], Array]
    concat: Float[np.ndarray, "t h w k"] | None = None
    noise_level: int | None = None
    state: State | None = None
    step: int = 0
    save: Callable[[int, State], None] = lambda step, state: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How clips are denoised: `rows` windows go through the UNet in one call, a multiple of the devices."""

    sampler: Sampler
    guidance: float
    windows: Sequence[Window]
    rows: int
    rescale: float = 0.0  # of the guidance
    image: bool = False


def denoise(model: StageModel, clips: Sequence[Clip], plan: Plan, on_window: Callable[[], None] = lambda: None) -> None:
    """Takes every clip, all of one shape, through the steps that it has left; then `state["x"]` is x0.

    Those that are furthest behind go first. `on_window` is called when a window is predicted; a clip's state is saved
    every SAVE_EVERY steps, and at the end.
    """
    for clip in clips:
        if clip.state is None:
            clip.state = _by_frames(clip, lambda frames, clip=clip: plan.sampler.init(clip.noise(0, frames)))
    while waiting := [clip for clip in clips if clip.step < plan.sampler.steps]:
        i = min(clip.step for clip in waiting)
        active = [clip for clip in waiting if clip.step == i]
        for clip, prediction in zip(active, _predictions(model, active, i, plan, on_window)):
            clip.state = _stepped(model, clip, prediction, plan.sampler)
            clip.step += 1
            if clip.step % SAVE_EVERY == 0 or clip.step == plan.sampler.steps:
                clip.save(clip.step, clip.state)


def _predictions(
    model: StageModel, clips: Sequence[Clip], i: int, plan: Plan, on_window: Callable[[], None]
) -> list[Float[np.ndarray, "t h w c"]]:
    """What the UNet answers for each clip at step i, its windows blended."""
    blended = [np.zeros(clip.shape, np.float32) for clip in clips]
    jobs = [(number, window) for number in range(len(clips)) for window in plan.windows]
    jobs.sort(key=lambda job: job[1].shape, reverse=True)  # of one program together
    groups = [
        list(rows)
        for _, same in itertools.groupby(jobs, key=lambda job: job[1].shape)
        for rows in _batched(same, plan.rows)
    ]

    def started():
        for group in groups:
            filled = [*group, *[group[-1]] * (plan.rows - len(group))]
            yield group, _predict_windows(model, [(clips[number], window) for number, window in filled], i, plan)

    for group, predictions in one_ahead(started()):
        for (number, window), prediction in zip(group, np.asarray(predictions)):
            blended[number][window.box] += window.weight * prediction
            on_window()
    return blended


def _predict_windows(
    model: StageModel, jobs: Sequence[tuple[Clip, Window]], i: int, plan: Plan
) -> Float[Array, "rows t h w c"]:
    """The UNet's answers for windows of one shape, computing: the host does not wait for them."""
    batch = parallel.batch_sharding(model.mesh)

    def stacked(rows):
        return parallel.put(np.stack(list(rows)), batch)

    state = {name: stacked(clip.state[name][window.box] for clip, window in jobs) for name in jobs[0][0].state}
    condition = Condition()
    if jobs[0][0].concat is not None:
        condition = condition._replace(concat=stacked(clip.concat[window.box] for clip, window in jobs))
    if jobs[0][0].noise_level is not None:
        condition = condition._replace(noise_level=stacked(np.int32(clip.noise_level) for clip, _ in jobs))
    return predict_rows(
        model.unet_params, state, i, stacked(clip.text for clip, _ in jobs),
        stacked(clip.null_text for clip, _ in jobs), condition, unet=model.unet, sampler=plan.sampler,
        guidance=float(plan.guidance), rescale=float(plan.rescale), image=plan.image,
        in_turn=in_turn(len(jobs) // model.mesh.size, jobs[0][1]), mesh=model.mesh,
    )  # fmt: skip


def in_turn(rows: int, window: Window) -> bool:
    """Whether the two guided halves of `rows` windows on a device go through the UNet one after the other."""
    return rows * int(np.prod(window.shape)) > TOGETHER_PLACES


def _stepped(model: StageModel, clip: Clip, prediction: Float[np.ndarray, "t h w c"], sampler: Sampler) -> State:
    """The clip's state after its next step, given the prediction at this one."""

    def step(frames):
        part = slice(frames.start, frames.stop)
        state = {name: array[part] for name, array in clip.state.items()}
        noise = clip.noise(clip.step + 1, frames) if sampler.needs_noise else None
        state, given = jax.device_put((state, prediction[part]), model.device)
        return _step(state, clip.step, given, noise, sampler=sampler)

    return _by_frames(clip, step)


def _by_frames(clip: Clip, f: Callable[[range], dict[str, Array]]) -> State:
    """`f` of all frames of a clip, as many at a time as have STEP_PLACES latent places."""
    count, height, width = clip.shape[:3]
    size = max(1, STEP_PLACES // (height * width))
    parts = [jax.device_get(f(range(i, min(i + size, count)))) for i in range(0, count, size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch


# ---- compiled ----


@functools.partial(jax.jit, static_argnames=("unet", "sampler", "guidance", "rescale", "image", "in_turn", "mesh"))
def predict_rows(
    params: dict,
    state: dict[str, Array],
    i: Int[Array, ""],
    text: Float[Array, "b l d"],
    null_text: Float[Array, "b l d"],
    condition: Condition,
    *,
    unet,
    sampler: Sampler,
    guidance: float,
    rescale: float,
    image: bool,
    in_turn: bool,
    mesh: Mesh,
) -> Float[Array, "b t h w c"]:
    """Every device runs the same program on its own windows."""

    def predict(params, state, i, text, null_text, condition):
        denoise = denoiser(
            unet,
            params,
            text,
            null_text,
            condition,
            guidance=guidance,
            rescale=rescale,
            image=image,
            sequential_guidance=in_turn,
        )
        answers = []

        def asked(x_t, t):
            answers.append(denoise(x_t, t))
            return answers[0]

        # Only the sampler knows what it asks the network at step i. The step itself waits for all windows' answers;
        # the compiler drops this one.
        sampler.step(state, i, asked, jnp.zeros_like(state["x"]) if sampler.needs_noise else None)
        return answers[0]

    specs = (ALL, BATCH, ALL, BATCH, BATCH, BATCH)
    return per_device(predict, mesh, *specs)(params, state, i, text, null_text, condition)


@functools.partial(jax.jit, static_argnames="sampler")
def _step(
    state: dict[str, Array],
    i: Int[Array, ""],
    prediction: Float[Array, "t h w c"],
    noise: Float[Array, "t h w c"] | None,
    *,
    sampler: Sampler,
) -> dict[str, Array]:
    """One step of frames, each a row of its own."""
    return sampler.step(state, i, lambda x_t, t: prediction, noise)
