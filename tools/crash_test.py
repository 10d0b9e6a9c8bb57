"""Kills a small training run again and again, and checks that it comes out as if nothing had happened.

    python tools/crash_test.py [--kills 20] [--seed 0]

Every kill is SIGKILL: while the run starts, between any two lines of training, or inside a save. After each,
the run must go on from the newest checkpoint that was finished; in the end the SHA-256 of its parameters and
the losses of all steps must be those of a run that nobody killed. `make crash-test` runs this, and
tests/test_crash.py a shorter one.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
MOMENTS = ("start", "training", "save")
EVERY = 4  # steps from checkpoint to checkpoint
TIMEOUT = 600.0  # seconds for one life of the run


def start(
    workdir: Path, steps: int, *, said: Path | None = None, env: Mapping[str, str] | None = None, **fields: object
) -> subprocess.Popen:
    """train.py on the smallest config; what it says goes to `said`.out and .err, by default `workdir`'s name."""
    fields = {"steps": steps, "checkpoint_every": EVERY, "log_every": 1, "held_out_every": steps, **fields}
    words = [sys.executable, "train.py", "--config", "configs/moving_shapes/vae.py:tiny", "--workdir", str(workdir)]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    said = said or workdir
    with said.with_suffix(".out").open("w") as out, said.with_suffix(".err").open("w") as err:
        return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out, stderr=err)


def finish(process: subprocess.Popen, workdir: Path) -> str:
    """The hash that a run prints in the end."""
    if process.wait(TIMEOUT):
        raise SystemExit(f"train.py failed: {workdir.with_suffix('.err').read_text()[-2000:]}")
    return workdir.with_suffix(".out").read_text().split()[-1]


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss, of the complete lines."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def newest(workdir: Path) -> int:
    """The newest finished checkpoint; 0 = none."""
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any("orbax-checkpoint-tmp" in p.name for p in (workdir / "checkpoints").glob("*"))


def kill(process: subprocess.Popen, workdir: Path, moment: str, rng: random.Random) -> bool:
    """Lets the run come to a random point of `moment`, and kills it. Whether it was still in it then."""
    deadline = time.monotonic() + TIMEOUT
    progress = workdir / "metrics.jsonl"
    begun = progress.stat().st_mtime_ns if progress.exists() else 0
    wanted = rng.randrange(1, 2 * EVERY)  # lines of metrics
    while moment != "start":
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended by itself: {workdir.with_suffix('.err').read_text()[-2000:]}")
        if moment == "save" and saving(workdir):
            break
        if moment == "training" and progress.exists() and progress.stat().st_mtime_ns != begun:
            wanted, begun = wanted - 1, progress.stat().st_mtime_ns
            if not wanted:
                break
        time.sleep(0.001)
    time.sleep({"start": rng.uniform(0, 10), "training": rng.uniform(0, 0.05), "save": rng.uniform(0, 0.02)}[moment])
    process.kill()
    process.wait()
    return moment != "save" or saving(workdir)


def survive(workdir: Path, kills: Sequence[str], *, steps: int, seed: int) -> str:
    """A run that is killed at these moments, to its end; its hash.

    A save that was over before the kill came is waited for again.
    """
    rng, lives = random.Random(seed), 0
    for moment in tqdm(kills, desc="kills", unit="kill"):
        hit = False
        while not hit:
            before = newest(workdir)
            process = start(workdir, steps)
            hit = kill(process, workdir, moment, rng)
            lives += 1
            check(workdir, before, moment)
    return finish(start(workdir, steps), workdir)


def check(workdir: Path, before: int, moment: str) -> None:
    """What must hold after each kill: the run resumed where it had to, and lost no checkpoint."""
    said = workdir.with_suffix(".err").read_text()
    resumed = re.search(r"resumed at step (\d+)", said)
    if resumed and int(resumed[1]) != before:
        raise SystemExit(f"resumed at step {resumed[1]}, but checkpoint {before} was finished")
    if newest(workdir) < before or "Traceback" in said or "error:" in said:
        raise SystemExit(f"killed in {moment}: checkpoint {newest(workdir)} after {before}\n{said[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments; default: 0")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    # Every third is forced into a save, which random moments seldom hit.
    kills = ["save" if i % 3 == 1 else rng.choice(MOMENTS[:2]) for i in range(args.kills)]
    steps = 4 * EVERY * (args.kills + 1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "compiled")  # of the runs that are started
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        wanted = finish(start(whole, steps), whole)
        found = survive(parts, kills, steps=steps, seed=args.seed)
        if found != wanted or losses(parts) != losses(whole) or len(losses(whole)) != steps:
            raise SystemExit(f"after {args.kills} kills the run ended at {found}, without them at {wanted}")
    print(f"{args.kills} kills ({', '.join(kills)}) changed nothing: {found}")


if __name__ == "__main__":
    main()
