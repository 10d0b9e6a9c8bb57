"""Measures FVD and KVD of the included base model on Moving Shapes, with its official settings and with each preset.

    python benchmarks/fvd_of_presets.py --json fvd_of_presets.json [--clips 64] [--rows official,fast]

The captions are those of clips 0 to n - 1 of split val, and the reference is clips n to 2n - 1. So the row of true
clips, 0 to n - 1 themselves, is the value of a perfect model. All rows have the same n and the same reference: they may
be compared with each other, and with nothing else. Videos are not stored, and thus not compressed. Rows that FILE has
already are kept, unless the number of clips differs.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lavie_jax import cascade, parallel, results
from lavie_jax.errors import Parser, UserError, one_line_errors, suggest
from lavie_jax.evaluation.fvd import fvd
from lavie_jax.evaluation.i3d_features import ClipFeatures, Extractor, prepared
from lavie_jax.evaluation.moving_shapes import true_samples
from lavie_jax.evaluation.protocols import FVDKnobs
from lavie_jax.stages.settings import PRESETS
from lavie_jax.weights.metric_weights import I3D_WEIGHTS, load_weights

KIND = "FVD of presets"
SPLIT = "val"
TRUE = "true clips"
BATCH = 16  # videos that are sampled at once


def features_of(clips: Iterable[np.ndarray], extract: Extractor, what: str) -> ClipFeatures:
    """Returns the features of uint8 clips (T, H, W, 3), one at a time."""
    each = [extract(prepared(clip, extract.knobs)[None]) for clip in tqdm(clips, desc=what, unit="clip")]
    return ClipFeatures(*(np.concatenate(x) for x in zip(*each)))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the table in Markdown. The interval is the bootstrap's."""

    def cells(row: dict[str, Any]) -> list[str]:
        """Returns the cells of a row."""
        low, high = row["fvd"]["interval"]
        return [
            f"{row['fvd']['value']:.0f} [{low:.0f}, {high:.0f}]",
            f"{row['kvd']['value']:.2f} ± {row['kvd']['sd']:.2f}",
            f"{row['motion']['ratio']:.2f}",
        ]

    n = next(iter(rows.values()))["n"]
    return results.markdown(
        [f"n = {n}", "FVD", "KVD", "motion, of the reference"], [[k, *cells(rows[k])] for k in rows]
    )


def main() -> None:
    """Measures the rows that are missing, and prints the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=64, metavar="N", help="clips of each set (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(PRESETS), help="presets (default: %(default)s)")
    parser.add_argument("--i3d", type=Path, help="the archive or file of the weights")
    args = parser.parse_args()
    results.check_path(args.json, KIND)
    for name in (wanted := args.rows.split(",")):
        if name not in PRESETS:
            raise UserError(f"--rows: unknown preset {name!r}{suggest(name, PRESETS)}")
    if args.clips < 2:
        raise UserError(f"--clips must be at least 2, not {args.clips}")
    parallel.keep_compiled_programs()
    knobs, n = FVDKnobs(), args.clips
    extract = Extractor(load_weights(I3D_WEIGHTS, args.i3d), knobs)
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    rows = {name: row for name, row in rows.items() if row["n"] == n}
    if all(name in rows for name in (TRUE, *wanted)):
        print(table(rows))
        return
    pipe = cascade.load(stages=("base",))
    samples = true_samples(SPLIT, 2 * n, pipe.weights["base"].sampling)
    true = features_of((sample.pixels for sample in samples), extract, TRUE)
    ours, reference = (ClipFeatures(*(x[half] for x in true)) for half in (slice(n), slice(n, None)))

    def add(name: str, features: ClipFeatures) -> None:
        """Compares a set with the reference, and stores the result."""
        rows[name] = fvd(features, reference, true, knobs)
        results.write(args.json, {"kind": KIND, "split": SPLIT, "rows": rows})

    if TRUE not in rows:
        add(TRUE, ours)
    captions = [sample.caption for sample in samples[:n]]
    for preset in wanted:
        if preset not in rows:
            made = pipe(captions, seed=list(range(n)), batch_size=BATCH, preset=preset, progress=True)
            add(preset, features_of(made, extract, preset))
    print(table(rows))


if __name__ == "__main__":
    with one_line_errors():
        main()
