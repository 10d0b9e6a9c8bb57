"""Counts the work of a video with each preset, in FLOPs of the traced programs, as the planner counts them.

    python benchmarks/work.py [--json FILE]

For the full-size cascade at its released sizes: 16 key frames of 320x512, 61 frames, 61 frames of 1280x2048. Nothing is
computed, so that no accelerator is needed; tracing takes a minute or two. Counted are the evaluations of the UNets. The
VAEs and the text encoder do the same work with every preset.
"""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

import jax

from configs import base, interpolation, vsr
from lavie_jax import cascade, results
from lavie_jax.cascade.running import guidance_of
from lavie_jax.diffusion import make_sampler
from lavie_jax.diffusion.guidance import COMPUTED, NONE, REUSED
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.flops import count_flops
from lavie_jax.planner.sampling import abstract_weights, sampling_program
from lavie_jax.stages import STAGES
from lavie_jax.stages.settings import PRESETS, Settings
from lavie_jax.weights import Weights

KIND = "work"
CONFIGS = {"base": base, "interpolation": interpolation, "vsr": vsr}


def evaluation_flops(config) -> dict[str, float]:
    """Returns the FLOPs of an evaluation of one window, {what it computes of guidance: FLOPs}."""
    program = sampling_program(config, config.stage, "guided step", jax.devices()[:1])

    def count(**static) -> float:
        changed = dataclasses.replace(program, static={**program.static, **static})
        return count_flops(changed.trace().jaxpr)

    half = count(guidance=1.0)
    return {COMPUTED: count(), REUSED: half, NONE: half}


def evaluations(weights: Weights, settings: Settings) -> Counter:
    """Returns the number of evaluations of a window by what they compute of guidance."""
    sampler = make_sampler(settings.sampler, settings.steps, weights.schedule, settings.spacing)
    return Counter(guidance_of(settings).plan(sampler.timesteps))


def measure() -> dict[str, dict]:
    """Returns {preset: {stage: evaluations by kind, and FLOPs}}."""
    weights = {stage: abstract_weights(module.get_config()) for stage, module in CONFIGS.items()}
    flops = {stage: evaluation_flops(module.get_config()) for stage, module in CONFIGS.items()}
    table: dict[str, dict] = {}
    for preset in PRESETS:
        settings = cascade.resolve_settings(weights, list(CONFIGS), {}, preset=preset)
        for stage, own in settings.items():
            windows = len(STAGES[stage].windows(STAGES[stage].latent_shape(weights[stage], own), own))
            counts = evaluations(weights[stage], own)
            work = windows * sum(flops[stage][mode] * n for mode, n in counts.items())
            table.setdefault(preset, {})[stage] = {"windows": windows, "evaluations": dict(counts), "flops": work}
    return table


def main() -> None:
    """Prints the table in Markdown."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    results.check_path(args.json, KIND)
    table = measure()
    print("| preset |", " | ".join(f"{stage}, PFLOP" for stage in CONFIGS), "| video, PFLOP | of official |")
    print("| --- |" + " --- |" * (len(CONFIGS) + 2))
    official = sum(row["flops"] for row in table[PRESETS[0]].values())
    for preset, rows in table.items():
        total = sum(row["flops"] for row in rows.values())
        cells = " | ".join(f"{row['flops'] / 1e15:.2f}" for row in rows.values())
        print(f"| {preset} | {cells} | {total / 1e15:.1f} | {total / official:.3f} |")
    if args.json:
        results.write(args.json, {"kind": KIND, "table": table})


if __name__ == "__main__":
    with one_line_errors():
        main()
