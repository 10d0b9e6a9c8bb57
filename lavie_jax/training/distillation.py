"""Distillation: a stage is trained to do in fewer evaluations what its teacher, the same network, does in more.

    guidance     one pass predicts what the teacher predicts under guidance in two       sec. 3.1, arXiv 2210.03142
    consistency  one pass predicts the end of the teacher's guided chain: a few steps    LCM, arXiv 2310.04378

The student starts from the teacher's weights, `init_from`, and is sampled without guidance. The teacher's guidance
scale is fixed (the papers also train on a range of scales, given to the network). The loss is that of any other
training, LaVie's Eq. 3, with another target. In consistency distillation, prediction and target are estimates of x0:
the student's, and, one step of DDIM further down the teacher's chain, that of the student's average, its EMA.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lavie_jax.data import tokens
from lavie_jax.diffusion.consistency import boundary_weights
from lavie_jax.diffusion.guidance import guide
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.fields import check_rules, field
from lavie_jax.models.registry import TextConfig
from lavie_jax.stages.conditioning import Text, TrainingPair
from lavie_jax.stages.settings import PRESETS
from lavie_jax.training.optimizer import ADAPTER

NONE, GUIDANCE, CONSISTENCY = "none", "guidance", "consistency"
TEACHER = "teacher"  # the name of its parameters among the frozen ones
SAMPLING = {  # of the student, whatever the teacher's is
    GUIDANCE: {"guidance": 1.0},
    CONSISTENCY: {"guidance": 1.0, "sampler": "lcm", "steps": 4, "spacing": None},
}

Predict = Callable[[Any, TrainingPair, Text], Array]


def student_presets(kind: str, teacher: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the presets of the student's weights folder, given its teacher's; {} means the presets of the stage.

    A consistency model needs few steps anyway, so its presets change nothing. A student of guidance keeps the teacher's
    samplers and steps, but not its guidance settings.
    """
    if kind == CONSISTENCY:
        return {name: {} for name in PRESETS[1:]}
    return {
        preset: {name: value for name, value in values.items() if not name.startswith("guidance")}
        for preset, values in teacher.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of distillation."""

    kind: str = field(
        "what the student learns from init_from, its teacher: guidance in one pass, or consistency, a few steps",
        default=NONE,
        choices=(NONE, GUIDANCE, CONSISTENCY),
    )
    guidance: float | None = field("guidance scale of the teacher (default: that of its weights folder)", default=None)
    solver_steps: int = field("consistency: number of steps of the teacher's chain", default=50, low=2, high=1000)

    def __post_init__(self):
        check_rules(DistillConfig, dataclasses.asdict(self), "config field 'distill.{}'")

    def check(self, config: Any, *, latents: bool) -> None:
        """Raises UserError for other fields of a stage's config that distillation does not allow.

        Args:
            config: the ConfigDict of a run.
            latents: whether it trains on a set of latents.
        """
        if self.kind == NONE:
            return
        for wrong, advice in (
            (not config.init_from, "needs a teacher: set init_from to its weights folder"),
            (config.inflate, "takes a teacher of the same stage: set inflate=False"),
            (config.train_text_encoder, "trains the UNet alone: set train_text_encoder=False"),
            (config.regime == ADAPTER, f"trains the network itself: choose another regime than {ADAPTER!r}"),
            (latents, "encodes the negative prompt, for which sets of latents have no text encoder: set data.source"),
            (config.sampling.guidance not in (None, 1), "makes a model without guidance: set sampling.guidance=1"),
            (
                config.sampling.negative_prompt is not None,
                "takes the negative prompt of its teacher's folder: leave out sampling.negative_prompt",
            ),
            (
                self.kind == CONSISTENCY and config.sampling.sampler not in (None, "lcm"),
                "makes a model for the sampler lcm: set sampling.sampler='lcm'",
            ),
        ):
            if wrong:
                raise UserError(f"distill.kind = {self.kind!r} {advice}.")

    def distillation(
        self, teacher: Mapping[str, Any], schedule: Schedule, text: TextConfig, tokenizer: Path
    ) -> "Distillation | None":
        """Returns what the student learns, or None.

        Args:
            teacher: sampling settings of the teacher.
            schedule: of the teacher and the student.
            text: configuration of the text encoder.
            tokenizer: its tokenizer's folder; where there is none, only shapes matter.

        Raises:
            UserError: nothing is left to learn.
        """
        if self.kind == NONE:
            return None
        scale = teacher["guidance"] if self.guidance is None else self.guidance
        if self.kind == GUIDANCE and scale == 1:
            raise UserError(
                "distill.kind = 'guidance': the teacher is sampled without guidance (1), so that there is nothing to "
                "learn; set distill.guidance, or distill.kind='consistency'."
            )
        ids, mask = np.zeros((1, text.length), np.int32), np.ones((1, text.length), bool)
        if tokenizer.is_dir():
            ids, mask = tokens.tokenize_with_mask(tokens.load_tokenizer(tokenizer), [teacher["negative_prompt"]])
        skip = max(1, schedule.steps // self.solver_steps)
        return Distillation(kind=self.kind, scale=scale, skip=skip, null_tokens=ids, null_mask=mask)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Distillation:
    """The target of a distilled student.

    Attributes:
        kind: GUIDANCE or CONSISTENCY.
        scale: the teacher's guidance scale.
        skip: timesteps of a step of the teacher's chain.
        null_tokens: the teacher's negative prompt.
        null_mask: True at its tokens and False at padding; None if the text encoder takes no mask.
    """

    kind: str
    scale: float
    skip: int
    null_tokens: Int[np.ndarray, "1 l"]
    null_mask: Bool[np.ndarray, "1 l"] | None

    def compare(
        self,
        predict: Predict,
        schedule: Schedule,
        pair: TrainingPair,
        text: Text,
        null_text: Text,
        *,
        student: Any,
        average: Any,
        teacher: Any,
    ) -> tuple[Float[Array, "b frames h w c"], Float[Array, "b frames h w c"]]:
        """Returns the student's prediction and its target, which has no gradient.

        Args:
            predict: the UNet's prediction, given parameters, a training pair and captions.
            schedule: of the teacher and the student.
            pair: x_t of the data.
            text: captions.
            null_text: the negative prompt in place of each of them.
            student, average, teacher: parameters of the UNet.
        """
        guided = predict(teacher, pair, text)
        if self.scale != 1:
            guided = guide(guided, predict(teacher, pair, null_text), self.scale)
        prediction = predict(student, pair, text)
        if self.kind == GUIDANCE:
            return prediction, jax.lax.stop_gradient(guided)
        x0, eps = schedule.x0_and_eps(guided, pair.x_t, pair.frame_t)
        later = pair._replace(t=self._later(pair.t), image_t=self._later(pair.image_t))
        later = later._replace(x_t=schedule.add_noise(x0, eps, later.frame_t))
        target = consistent_x0(schedule, predict(average, later, text), later)
        return consistent_x0(schedule, prediction, pair), jax.lax.stop_gradient(target)

    def _later(self, t: Array) -> Array:
        return jnp.maximum(t - self.skip, 0)


def consistent_x0(
    schedule: Schedule, prediction: Float[Array, "b frames h w c"], pair: TrainingPair
) -> Float[Array, "b frames h w c"]:
    """Returns the consistency function of a training pair (`diffusion.consistency`)."""
    x0, _ = schedule.x0_and_eps(prediction, pair.x_t, pair.frame_t)
    skip, out = (weight[..., None, None, None] for weight in boundary_weights(pair.frame_t))
    return skip * pair.x_t + out * x0
