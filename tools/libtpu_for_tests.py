"""Installs the TPU compiler (libtpu) that matches the installed jax, for the planner's tests. No TPU is needed.

    python tools/libtpu_for_tests.py        # run by `make test`

The compiler goes to a separate folder of the environment, because jax searches for a TPU at every start if it can
import libtpu. If it cannot be installed, the tests that need it are skipped. Prints which case applies.
"""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FOLDER = Path(sys.prefix) / "libtpu-for-tests"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]


def requirement() -> str:
    """Returns jax's own requirement, such as "libtpu==0.0.42.*"."""
    return next(word for need in metadata.requires("jax") if (word := re.split(r"[ ;]", need)[0]).startswith("libtpu"))


def main() -> None:
    """Installs libtpu, unless the right version is installed."""
    libtpu, note = requirement(), FOLDER / "wanted"
    if note.exists() and note.read_text() == libtpu:
        print(f"{libtpu} is installed in {FOLDER}: the planner's compilation tests run.")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    if subprocess.run([*PIP, "install", "--no-deps", "--target", FOLDER, libtpu]).returncode:
        shutil.rmtree(FOLDER, ignore_errors=True)
        print(f"pip could not install {libtpu}: the planner's compilation tests are skipped.")
        return
    note.write_text(libtpu)
    print(f"{libtpu} was installed in {FOLDER}: the planner's compilation tests run.")


if __name__ == "__main__":
    main()
