"""Counts the work of a video with each preset and each trick alone, in FLOPs of the traced programs.

    python benchmarks/work.py [--json FILE]

For the full-size cascade at its released sizes: 16 key frames of 320x512, 61 frames, 61 frames of 1280x2048. Nothing is
computed, so that no accelerator is needed; tracing takes a minute or two. Counted are the evaluations of the UNets, as
the planner counts them. The VAEs and the text encoder do the same work in every row.
"""

import argparse
import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lavie_jax import cascade, results
from lavie_jax.cascade.denoising import halves
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.flops import count_flops
from lavie_jax.planner.sampling import abstract_weights, sampling_program
from lavie_jax.stages import STAGES
from lavie_jax.stages.settings import PRESETS, Settings
from lavie_jax.stages.stage import feature_cache_of, guidance_of
from lavie_jax.training import options
from lavie_jax.weights import Weights

KIND = "work"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that configs can import each other
FULL_SIZE = {stage: f"{ROOT}/configs/{stage}.py" for stage in ("base", "interpolation", "vsr")}
TRICKS: dict[str, dict[str, Any]] = {  # settings of all stages
    "guidance from 200": {"guidance_low": 200},
    "guidance every 2": {"guidance_every": 2},
    "guidance every 3": {"guidance_every": 3},
    "cache every 2": {"cache_every": 2},
    "cache every 3": {"cache_every": 3},
    "dpm++2m, 20 steps": {"sampler": "dpm++2m", "steps": 20},
    "unipc, 10 steps": {"sampler": "unipc", "steps": 10},
    "guidance distilled": {"guidance": 1.0},
    "lcm, 4 steps": {"sampler": "lcm", "steps": 4, "guidance": 1.0},
}


@functools.cache
def evaluation_flops(spec: str, cache_depth: int) -> dict[bool, float]:
    """Returns the FLOPs of one half of guidance in a window of the stage that the config `spec` describes.

    The keys are whether the whole UNet is computed, or its outermost layers to `cache_depth`. Both halves of guidance
    are twice the work.
    """
    config = options.load(spec)
    program = sampling_program(config, config.stage, "guided step", jax.devices()[:1])
    static = {**program.static, "guidance": 1.0, "cache_depth": cache_depth}
    whole = program.function.trace(*program.arguments, **static)
    deep = jax.ShapeDtypeStruct(whole.out_info.deep.shape, whole.out_info.deep.dtype)
    outermost = program.function.trace(*program.arguments, None, deep, **static)
    return {True: count_flops(whole.jaxpr), False: count_flops(outermost.jaxpr)}


def stage_work(spec: str, weights: Weights, settings: Settings) -> dict[str, Any]:
    """Returns the number of windows, of evaluations by kind, and the FLOPs of a stage's clip with these settings."""
    sampler = make_sampler(settings.sampler, settings.steps, weights.schedule, settings.spacing)
    modes = guidance_of(settings).plan(sampler.timesteps)
    counts = Counter(zip(modes, feature_cache_of(settings).plan(modes)))
    flops = evaluation_flops(spec, settings.cache_depth)
    stage = STAGES[weights.stage]
    windows = len(stage.windows(stage.latent_shape(weights, settings), settings))
    evaluations = {mode if whole else f"{mode}, outermost layers": n for (mode, whole), n in counts.items()}
    work = windows * sum(halves(mode) * flops[whole] * n for (mode, whole), n in counts.items())
    return {"windows": windows, "evaluations": evaluations, "flops": work}


def measure() -> dict[str, dict]:
    """Returns {row: {stage: evaluations by kind, and FLOPs}} of all presets and tricks."""
    weights = {stage: abstract_weights(options.load(spec)) for stage, spec in FULL_SIZE.items()}

    def row(given: Mapping[str, Any], preset: str) -> dict[str, Any]:
        settings = cascade.resolve_settings(weights, list(FULL_SIZE), {}, preset=preset)
        # changed afterwards, because resolving refuses what this machine has too little memory for
        settings = {stage: dataclasses.replace(own, **given) for stage, own in settings.items()}
        return {stage: stage_work(FULL_SIZE[stage], weights[stage], own) for stage, own in settings.items()}

    table = {preset: row({}, preset) for preset in PRESETS}
    return table | {name: row(given, PRESETS[0]) for name, given in TRICKS.items()}


def main() -> None:
    """Prints the table in Markdown."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    results.check_path(args.json, KIND)
    table = measure()
    official = sum(cells["flops"] for cells in table[PRESETS[0]].values())
    lines = []
    for name, cells in table.items():
        total = sum(cell["flops"] for cell in cells.values())
        each = [f"{cell['flops'] / 1e15:.2f}" for cell in cells.values()]
        lines.append([name, *each, f"{total / 1e15:.1f}", f"{total / official:.3f}"])
    header = ["settings", *(f"{stage}, PFLOP" for stage in FULL_SIZE), "video, PFLOP", "of official"]
    print(results.markdown(header, lines))
    if args.json:
        results.write(args.json, {"kind": KIND, "table": table})


if __name__ == "__main__":
    with one_line_errors():
        main()
