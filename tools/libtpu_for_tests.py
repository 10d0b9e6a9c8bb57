"""Gives the planner's tests the TPU compiler that belongs to the installed jax; no TPU is needed.

Run by `make test`. It goes into a folder of its own in the environment: where jax finds libtpu by itself, it looks for
a TPU at every start. Without it those tests are skipped; what is printed says which case it is.
"""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FOLDER = Path(sys.prefix) / "libtpu-for-tests"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]


def wanted() -> str:
    """As jax has it: "libtpu==0.0.42.*"."""
    return next(word for need in metadata.requires("jax") if (word := re.split(r"[ ;]", need)[0]).startswith("libtpu"))


def main() -> None:
    want, note = wanted(), FOLDER / "wanted"
    if note.exists() and note.read_text() == want:
        print(f"{want} is installed beside the environment: the planner's tests run.")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    if subprocess.run([*PIP, "install", "--no-deps", "--target", FOLDER, want]).returncode:
        shutil.rmtree(FOLDER, ignore_errors=True)
        print(f"No {want}: pip could not install it. The planner's tests that compile for a TPU are skipped.")
        return
    note.write_text(want)
    print(f"{want} was installed beside the environment: the planner's tests run.")


if __name__ == "__main__":
    main()
