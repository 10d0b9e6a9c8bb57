"""Builds a wheel, installs it into an empty environment, and runs its commands there.

    python tools/wheel_test.py              # installs the dependencies, as a user would
    python tools/wheel_test.py --offline    # takes them from the environment of this Python

Samples with the shipped model in an empty folder. Prints the time of each step; the exit code is 1 if a step fails.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moving left"


def run(what: str, *command: str | Path, cwd: Path, code: int = 0) -> str:
    """Runs a command and returns its output. Exits with code 1 unless its exit code is `code`."""
    start = time.monotonic()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    if done.returncode != code:
        sys.exit(f"{what}: exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="use the packages of this environment")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        isolation = ["--no-build-isolation"] if args.offline else []
        run("wheel", *pip, "wheel", ROOT, "--no-deps", *isolation, "--wheel-dir", home / "wheels", cwd=home)
        (wheel,) = (home / "wheels").glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
        run("environment", sys.executable, "-m", "venv", home / "env", cwd=home)
        bin = home / "env" / "bin"
        if args.offline:
            site = run("packages", bin / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=home)
            (Path(site.strip()) / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [bin / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        run("install", *command, *(["--no-deps", "--no-index"] if args.offline else []), wheel, cwd=home)
        empty = home / "empty"
        empty.mkdir()
        run("lavie-sample", bin / "lavie-sample", "--prompt", PROMPT, "--steps", "4", "--out", "out", cwd=empty)
        if not list(empty.glob("out/*.mp4")):
            sys.exit("lavie-sample wrote no video")
        run("lavie-convert", bin / "lavie-convert", "--help", cwd=empty)
        config = "configs/moving_shapes/base.py:tiny"
        usage = run("lavie-train", bin / "lavie-train", "--help", "--config", config, cwd=empty)
        if "optimizer.learning_rate = " not in usage:
            sys.exit(f"lavie-train did not read {config}")
        has_gradio = "import importlib.util, sys; sys.exit(importlib.util.find_spec('gradio') is None)"
        if subprocess.run([bin / "python", "-c", has_gradio]).returncode:
            refusal = run("lavie-app", bin / "lavie-app", cwd=empty, code=2)
            if "pip install 'lavie_jax[app]'" not in refusal:
                sys.exit(f"lavie-app without Gradio printed {refusal!r}")
    print("the wheel works")


if __name__ == "__main__":
    main()
