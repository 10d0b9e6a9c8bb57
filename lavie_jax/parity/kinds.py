"""How each kind of golden case is run on our models: a function of the case that returns its outputs.

Parameters pass through the converter's tables on their way into the model, so that those are tested too.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict

from lavie_jax.diffusion import Schedule, make_sampler, sample
from lavie_jax.errors import UserError, suggest
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.parity.cases import Arrays, Case
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import Condition, denoiser
from lavie_jax.weights.diffusers_configs import clip_text_config, unet_config, vae_config
from lavie_jax.weights.expected import compare
from lavie_jax.weights.names import from_torch, is_buffer


def channels_last(x: np.ndarray) -> jax.Array:
    """PyTorch's layout to ours: videos b c t h w, images b c h w; text (b l d) is the same in both."""
    pattern = {5: "b c t h w -> b t h w c", 4: "b c h w -> b h w c"}.get(x.ndim)
    return jnp.asarray(rearrange(x, pattern) if pattern else x)


def channels_first(x: jax.Array) -> np.ndarray:
    """The inverse of `channels_last`."""
    pattern = {5: "b t h w c -> b c t h w", 4: "b h w c -> b c h w"}.get(x.ndim)
    return np.asarray(rearrange(x, pattern) if pattern else x)


def take(case: Case, name: str) -> jax.Array:
    """An input of the case, channels-last."""
    return channels_last(case.input(name))


def load_params(case: Case, part: str, config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict:
    """The parameters of the model that `config` describes, drawn and converted tensor by tensor.

    `part` names the converter's table: unet, vae or text_encoder. UserError tells the first difference, in
    names or shapes, between the case's parameters and the model's; nothing is drawn then.
    """

    def shape_only(shape):  # an array of that shape without its memory
        return np.broadcast_to(np.float32(0), shape)

    converted = {name: from_torch(part, name, shape_only(shape)) for name, shape in case.parameters.items()}
    given = {path: array.shape for path, array in converted.values()}
    if differences := compare(part, config, given):
        raise UserError(f"{len(differences)} parameters do not fit; {differences[0]}")
    params = {}
    for name, shape in case.parameters.items():
        if not is_buffer(name):
            path, value = from_torch(part, name, case.parameter(name, shape))
            params[path] = jnp.asarray(np.ascontiguousarray(value))
    return unflatten_dict(params, sep="/")


def run_text(case: Case) -> Arrays:
    """A text encoder: tokens to hidden states."""
    model = CLIPText(clip_text_config(case.model))
    tokens = jnp.asarray(case.stored["ids"], jnp.int32)
    params = load_params(case, "text_encoder", model.config)
    return {"last_hidden_state": np.asarray(jax.jit(model.apply)({"params": params}, tokens))}


def run_vae(case: Case) -> Arrays:
    """A VAE: an image to its posterior, a latent to its image."""
    model = VAE(vae_config(case.model))
    variables = {"params": load_params(case, "vae", model.config)}
    encode, decode = (jax.jit(partial(model.apply, method=method)) for method in ("encode", "decode"))
    mean, logvar = encode(variables, take(case, "image"))
    decoded = decode(variables, take(case, "latent"))
    outputs = {"mean": mean, "logvar": logvar, "decoded": decoded}
    return {name: channels_first(output) for name, output in outputs.items()}


def run_unet(case: Case) -> Arrays:
    """One call of a UNet, of the stage that the kind names."""
    stage = case.kind.removesuffix("_unet")
    x = take(case, "sample")
    if stage == "vsr":
        x = jnp.concatenate([x, take(case, "low_res")], axis=-1)
    timesteps = jnp.broadcast_to(jnp.asarray(case.inputs["timesteps"]), x.shape[:1])
    level = None
    if stage == "vsr":
        level = jnp.broadcast_to(jnp.asarray(case.inputs["noise_level"]), x.shape[:1])
    unet = UNet(unet_config(case.model, stage))
    variables = {"params": load_params(case, "unet", unet.config)}
    output = jax.jit(unet.apply)(variables, x, timesteps, take(case, "context"), noise_level=level)
    return {"output": channels_first(output)}


def run_trajectory(case: Case, stage: str, samplers: list[str], condition: Condition, null_context: str) -> Arrays:
    """The latents that each sampler ends at, from the case's `init` noise under classifier-free guidance."""
    unet = UNet(unet_config(case.model, stage))
    params = load_params(case, "unet", unet.config)
    text, null_text = take(case, "context"), take(case, null_context)
    guidance = case.settings["guidance_scale"]

    @jax.jit
    def guided(params, x, t):
        return denoiser(unet, params, text, null_text, condition, guidance=guidance)(x, t)

    def denoise(x, t):  # float timesteps for every sampler, as Euler's are: one compilation
        return guided(params, x, jnp.asarray(t, jnp.float32))

    def noise_at(i):
        return channels_last(case.draw(f"{case.name}/noise/{i}", case.inputs["init"]))

    latents = {}
    for name in samplers:
        sampler = make_sampler(name, case.settings["steps"], STAGES[stage].schedule)
        latents[name] = channels_first(sample(sampler, denoise, take(case, "init"), noise_at))
    return latents


def run_base_sample(case: Case) -> Arrays:
    """The base stage, with each sampler that the case has latents of."""
    return run_trajectory(case, "base", sorted(case.stored), STAGES["base"].condition({}), "uncond_context")


def run_interpolation_sample(case: Case) -> Arrays:
    """The interpolation stage on given key frames, with its own sampler."""
    stage = STAGES["interpolation"]
    condition = stage.condition({"key_latents": take(case, "key_frames")})
    sampler = stage.sampling["sampler"]
    latents = run_trajectory(case, "interpolation", [sampler], condition, "negative_context")
    return {"latents": latents[sampler]}


def run_vsr_sample(case: Case) -> Arrays:
    """The super-resolution stage on given frames, with its own sampler."""
    stage, frames = STAGES["vsr"], take(case, "frames")
    level = jnp.full(frames.shape[0], case.settings["noise_level"], jnp.int32)
    noise = take(case, "low_res_noise")
    condition = stage.condition({"low_res": frames, "low_res_noise": noise, "noise_level": level})
    sampler = stage.sampling["sampler"]
    latents = run_trajectory(case, "vsr", [sampler], condition, "uncond_context")
    return {"noised_low_res": channels_first(condition.concat), "latents": latents[sampler]}


LOOP_SAMPLERS = {  # name in the case -> our name, what the model predicts
    "ddpm": ("ddpm", "epsilon"),
    "ddim": ("ddim", "epsilon"),
    "euler": ("euler", "epsilon"),
    "interp_ddim": ("respaced_ddim", "epsilon"),
    "vsr_ddim_v": ("ddim", "v_prediction"),
}


def run_sampling_loops(case: Case) -> Arrays:
    """Samplers alone, with the exact denoiser of Gaussian data (mean 0.3, variance 0.25) for a model."""
    out = {}
    for key in (k for k in case.stored if not k.endswith("_timesteps")):
        name, _, steps = key.rpartition("_")
        if name not in LOOP_SAMPLERS or not steps.isdecimal():
            raise UserError(f"unknown sampler {name!r} in output {key!r}{suggest(name, LOOP_SAMPLERS)}")
        out[key], out[f"{key}_timesteps"] = run_loop(case, name, int(steps))
    return out


def run_loop(case: Case, name: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The end state of one sampler, and the timesteps that it asked its model about."""
    sampler_name, prediction = LOOP_SAMPLERS[name]
    schedule = Schedule("linear", 1e-4, 0.02, prediction=prediction)
    asked = []

    def denoise(x, t):
        asked.append(float(t[0]))
        return gaussian_denoiser(schedule, x, t)

    def draw(what):
        return jnp.asarray(case.draw(f"loop/{name}/{steps}/{what}", case.settings["shape"]))

    sampler = make_sampler(sampler_name, steps, schedule)
    end = sample(sampler, denoise, draw("init"), lambda i: draw(f"noise/{i}"))
    return np.asarray(end), np.asarray(asked)


def gaussian_denoiser(schedule: Schedule, x: jax.Array, t: jax.Array) -> jax.Array:
    """What the best possible network answers when the data are Gaussian with mean 0.3 and variance 0.25."""
    a = float(schedule.alphas_cumprod[round(float(t[0]))])
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    eps = noise * (x - 0.3 * signal) / (0.25 * a + 1 - a)
    return eps if schedule.prediction == "epsilon" else signal * eps - noise * (x - noise * eps) / signal


RUN: dict[str, Callable[[Case], Arrays]] = {
    "clip_text": run_text,
    "vae": run_vae,
    "base_unet": run_unet,
    "interpolation_unet": run_unet,
    "vsr_unet": run_unet,
    "base_sample": run_base_sample,
    "interpolation_sample": run_interpolation_sample,
    "vsr_sample": run_vsr_sample,
    "sampling_loops": run_sampling_loops,
}
