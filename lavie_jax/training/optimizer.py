"""AdamW or Muon, with warm-up and clipping, and the choice of parameters that are trained (paper, appendix D)."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
import optax.contrib
from flax import traverse_util

from lavie_jax.errors import UserError, suggest

# LaVie compares three regimes of fine-tuning an image model on video (appendix D): the whole UNet on images and videos
# (best), the whole UNet on videos only (it forgets), the temporal layers only (poor). "motion_only" is ours: the motion
# embedding only, before the rest (see `models.additions.MotionEmbedding`). "lora" trains an adapter (`lora.py`).
REGIMES = ("joint", "video_only", "temporal_only", "motion_only", "lora")
ADAPTER = "lora"  # the regime, and the name of the adapter's tree in the parameters

KINDS = ("adamw", "muon")
DECAYS = ("constant", "cosine")
ADAMW_RMS = 0.2  # RMS of AdamW's updates at a learning rate of 1, as measured in arXiv 2502.16982, sec. 2.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer. The paper gives none of them; the defaults follow Stable Diffusion."""

    kind: str = "adamw"  # or "muon": far fewer steps when training from scratch, see `make_optimizer`
    learning_rate: float = 1e-4
    warmup: int = 1000  # updates of linear warm-up
    decay: str = "constant"  # after the warm-up: "constant" or "cosine" (to zero at the last update)
    b1: float = 0.9  # Adam's b1 and b2
    b2: float = 0.999
    weight_decay: float = 0.01  # of kernels only
    clip: float = 1.0  # maximum global norm of the gradients; 0 = no clipping

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown optimizer.kind {self.kind!r}{suggest(self.kind, KINDS)}")
        if self.decay not in DECAYS:
            raise UserError(f"unknown optimizer.decay {self.decay!r}{suggest(self.decay, DECAYS)}")
        for name in ("learning_rate", "warmup", "weight_decay", "clip"):
            check_number(f"optimizer.{name}", getattr(self, name), low=0)
        for name in ("b1", "b2"):
            check_number(f"optimizer.{name}", getattr(self, name), low=0, below=1)


def check_number(name: str, value: float, *, low: float, below: float = math.inf) -> None:
    """Raises UserError unless `low` <= `value` < `below`."""
    if not low <= value < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise UserError(f"config field {name!r} must be finite, at least {low}{limit}; given {value}.")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the function update number -> learning rate."""
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup, max(steps, config.warmup + 1)
        )
    # A warm-up of 0 would divide by zero inside optax's linear schedule.
    if config.warmup:
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    return optax.constant_schedule(config.learning_rate)


def updates_done(opt_state: Any) -> jax.Array:
    """Number of updates applied, which the learning rate depends on. Skipped steps do not count."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer: clipping by global norm, then AdamW or Muon; weight decay of kernels only.

    Muon (K. Jordan 2024; arXiv 2502.16982) equalises the singular values of a kernel's update, so that directions that
    matter to few examples are learned as fast as those that matter to all. Its updates are scaled to AdamW's usual
    size, so that one learning rate fits both. Parameters other than inner kernels use Adam.
    """
    rate = learning_rate(config, steps)
    if config.kind == "adamw":
        decayed = lambda params: {path: path.endswith("kernel") for path in params}  # noqa: E731
        kind = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    else:
        kind = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=ADAMW_RMS,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), kind) if config.clip else kind


def _matrices(params: Mapping[str, Any]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Maps each parameter to the matrix (inputs, outputs) that Muon sees, or to None for Adam.

    First and last layers go to Adam, as Muon's author recommends: their inputs or outputs are not hidden features.
    """

    def inner(path: str) -> bool:
        first_or_last = re.search(
            r"/(conv_in|conv_out|(key|known)_frame_(embedding|skip)_temporal|velocity_temporal|low_res_skip)/", path
        )
        return path.endswith("/kernel") and not first_or_last

    return {
        path: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,)) if inner(path) else None
        for path, x in params.items()
    }


def is_trained(path: str, *, regime: str, images_only: bool) -> bool:
    """Whether the parameter at `path` (e.g. `unet/conv_in/kernel`) is trained.

    Temporal layers do nothing without video frames; leaving them out protects them from weight decay.
    """
    if regime == "motion_only":
        return "motion_embedding" in path
    if regime == ADAPTER:
        return path.startswith(f"{ADAPTER}/")
    temporal = "temporal" in path
    return temporal if regime == "temporal_only" else not (temporal and images_only)


def split(params: Mapping[str, Any], *, regime: str, images_only: bool) -> tuple[dict, dict]:
    """Splits a nested dict of parameters into two, (trained, untrained), without a leaf in common."""
    if regime not in REGIMES:
        raise UserError(f"unknown regime {regime!r}{suggest(regime, REGIMES)}")
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {k: v for k, v in flat.items() if is_trained(k, regime=regime, images_only=images_only)}
    if not trained:
        raise UserError(f"regime {regime!r} does not train any parameter of this model.")
    untrained = {k: v for k, v in flat.items() if k not in trained}
    return traverse_util.unflatten_dict(trained, sep="/"), traverse_util.unflatten_dict(untrained, sep="/")


def merge(trained: Mapping[str, Any], untrained: Mapping[str, Any]) -> dict:
    """Merges two nested dicts without a leaf in common: the inverse of `split`."""
    flat = traverse_util.flatten_dict(trained, sep="/") | traverse_util.flatten_dict(untrained, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
