"""Kills a small training run repeatedly, and checks that the result equals that of an uninterrupted run.

    python tools/crash_test.py [--kills 50] [--host-kills 2] [--seed 0]

Every kill is a SIGKILL during startup, between training steps, or during a save. After each, the run must resume from
the latest complete checkpoint. At the end, the SHA-256 of the parameters and the losses of all steps must equal those
of an uninterrupted run. `make crash-test` runs this script, and tests/test_crash.py a shorter version.

`--host-kills` of the kills are in a run of two processes, which train together as two hosts do. One of them is killed,
and the other must end by itself within half a minute.
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
MOMENTS = ("start", "training", "save")
EVERY = 4  # steps between checkpoints
TIMEOUT = 600.0  # seconds until a run reaches the moment of a kill
WHOLE_TIMEOUT = 3600.0  # seconds for a run that is not killed
ALONE = 30.0  # seconds in which a host must end after the other was killed


def start(
    workdir: Path, steps: int, *, log: Path | None = None, env: Mapping[str, str] | None = None, **fields: object
) -> subprocess.Popen:
    """Starts train.py on the smallest config, with its output in `log`.out and `log`.err (default: `workdir`.*)."""
    fields = {"steps": steps, "checkpoint_every": EVERY, "log_every": 1, "held_out_every": steps, **fields}
    words = [sys.executable, "train.py", "--config", "configs/moving_shapes/vae.py:tiny", "--workdir", str(workdir)]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    log = log or workdir
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out, stderr=err)


def finish(process: subprocess.Popen, workdir: Path) -> str:
    """Waits for a run and returns the parameter hash that it prints at the end."""
    try:
        code = process.wait(WHOLE_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise SystemExit(f"train.py took more than {WHOLE_TIMEOUT:.0f} s: {workdir.with_suffix('.err')}") from None
    if code:
        raise SystemExit(f"train.py failed: {workdir.with_suffix('.err').read_text()[-2000:]}")
    return workdir.with_suffix(".out").read_text().split()[-1]


def losses(workdir: Path) -> dict[int, float]:
    """Returns {step: loss} from the complete lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def newest(workdir: Path) -> int:
    """Returns the step of the latest complete checkpoint; 0 = none."""
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def saving(workdir: Path) -> bool:
    """Returns whether a checkpoint is being written."""
    return any("orbax-checkpoint-tmp" in p.name for p in (workdir / "checkpoints").glob("*"))


def kill(process: subprocess.Popen, workdir: Path, moment: str, rng: random.Random) -> bool:
    """Kills the run at a random point of `moment`. Returns whether the kill hit that phase."""
    deadline = time.monotonic() + TIMEOUT
    progress = workdir / "metrics.jsonl"
    modified = progress.stat().st_mtime_ns if progress.exists() else 0
    lines_left = rng.randrange(1, 2 * EVERY)  # of metrics, before the kill
    while moment != "start":
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended before it was killed: {workdir.with_suffix('.err').read_text()[-2000:]}")
        if moment == "save" and saving(workdir):
            break
        if moment == "training" and progress.exists() and progress.stat().st_mtime_ns != modified:
            lines_left, modified = lines_left - 1, progress.stat().st_mtime_ns
            if not lines_left:
                break
        time.sleep(0.001)
    time.sleep({"start": rng.uniform(0, 10), "training": rng.uniform(0, 0.05), "save": rng.uniform(0, 0.02)}[moment])
    process.kill()
    process.wait()
    return moment != "save" or saving(workdir)


def survive(workdir: Path, kills: Sequence[str], *, steps: int, seed: int) -> str:
    """Kills a run at these moments and then lets it finish; returns its hash.

    If a save ends before the kill arrives, the kill is repeated at the next save.
    """
    rng = random.Random(seed)
    for moment in tqdm(kills, desc="kills", unit="kill"):
        hit = False
        while not hit:
            before = newest(workdir)
            process = start(workdir, steps)
            hit = kill(process, workdir, moment, rng)
            check(workdir, before, moment)
    return finish(start(workdir, steps), workdir)


def start_hosts(workdir: Path, steps: int) -> list[subprocess.Popen]:
    """Starts two processes that train together; their output is in `workdir`.* and in `workdir`-second.*"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(
            workdir, steps, log=log, env={**shared, "JAX_PROCESS_ID": str(i)}, **{"distributed": True, "mesh.fsdp": 2}
        )
        for i, log in enumerate((workdir, workdir.with_name(f"{workdir.name}-second")))
    ]


def finish_hosts(hosts: Sequence[subprocess.Popen], workdir: Path) -> str:
    """Waits for a run of two processes and returns the parameter hash that the first one prints."""
    digest = finish(hosts[0], workdir)
    finish(hosts[1], workdir.with_name(f"{workdir.name}-second"))
    return digest


def survive_on_hosts(workdir: Path, kills: Sequence[str], *, steps: int, seed: int) -> tuple[str, float]:
    """Kills one of two hosts at these moments, the second one first, and then lets the run finish.

    Returns:
        The run's hash, and the longest time in seconds that the other host took to end.
    """
    rng, longest = random.Random(seed), 0.0
    for i, moment in enumerate(tqdm(kills, desc="kills of a host", unit="kill")):
        before, hosts = newest(workdir), start_hosts(workdir, steps)
        victim, other = hosts[1 - i % 2], hosts[i % 2]
        kill(victim, workdir, moment, rng)
        killed = time.monotonic()
        try:
            other.wait(ALONE)
        except subprocess.TimeoutExpired:
            other.kill()
            raise SystemExit(f"a host still runs {ALONE:.0f} s after the other was killed during {moment}") from None
        longest = max(longest, time.monotonic() - killed)
        if newest(workdir) < before:
            raise SystemExit(f"killed during {moment}: checkpoint {newest(workdir)} after {before}")
    return finish_hosts(start_hosts(workdir, steps), workdir), longest


def check(workdir: Path, before: int, moment: str) -> None:
    """Checks after a kill that the run resumed from the right checkpoint, lost none, and raised no error."""
    log = workdir.with_suffix(".err").read_text()
    resumed = re.search(r"resumed at step (\d+)", log)
    if resumed and int(resumed[1]) != before:
        raise SystemExit(f"resumed at step {resumed[1]}, but the latest complete checkpoint is {before}")
    if newest(workdir) < before or "Traceback" in log or "error:" in log:
        raise SystemExit(f"killed during {moment}: checkpoint {newest(workdir)} after {before}\n{log[-2000:]}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: %(default)s)")
    parser.add_argument("--host-kills", type=int, default=2, help="of them on two processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: %(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    # Every third kill targets a save, which random moments rarely hit.
    alone = args.kills - args.host_kills
    kills = ["save" if i % 3 == 1 else rng.choice(MOMENTS[:2]) for i in range(alone)]
    host_kills = ["save" if i % 2 else "training" for i in range(args.host_kills)]
    steps, host_steps = (4 * EVERY * (count + 1) for count in (alone, args.host_kills))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "compiled")  # for the child processes
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        expected = finish(start(whole, steps, checkpoint_every=steps), whole)  # its checkpoints are not needed
        actual = survive(parts, kills, steps=steps, seed=args.seed)
        if actual != expected or losses(parts) != losses(whole) or len(losses(whole)) != steps:
            raise SystemExit(f"parameters after {alone} kills: {actual}; of an uninterrupted run: {expected}")
        print(f"{alone} kills ({', '.join(kills)}) did not change the result: {actual}")
        if host_kills:
            whole, parts = Path(folder) / "whole-hosts", Path(folder) / "parts-hosts"
            expected = finish_hosts(start_hosts(whole, host_steps), whole)
            actual, longest = survive_on_hosts(parts, host_kills, steps=host_steps, seed=args.seed)
            if actual != expected or losses(parts) != losses(whole):
                raise SystemExit(f"parameters after kills of a host: {actual}; of an uninterrupted run: {expected}")
            print(
                f"{args.host_kills} kills of one of two hosts ({', '.join(host_kills)}) did not change the result: "
                f"{actual}; the other host ended after at most {longest:.1f} s"
            )


if __name__ == "__main__":
    main()
