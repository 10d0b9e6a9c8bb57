"""Weights in buckets, against fsspec's file system in memory."""

from pathlib import Path

import fsspec
import pytest
import tiny
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import sample
from lavie_jax import cascade, remote
from lavie_jax.errors import UserError
from lavie_jax.training import options
from lavie_jax.weights import folder_hash, locations
from lavie_jax.weights.locations import local_folder


class Bucket(MemoryFileSystem):
    """Objects in memory; `got` are the names of those that were downloaded."""

    got: list = []
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].rstrip("/") if "://" in path else path

    def get_file(self, rpath, lpath, **kwargs):
        self.got.append(rpath.rpartition("shapes/")[2])
        super().get_file(rpath, lpath, **kwargs)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An empty bucket; the cache is in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(Bucket, "got", [])
    system = Bucket()
    monkeypatch.setattr(fsspec, "url_to_fs", lambda place: (system, system._strip_protocol(place)))
    return system


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_cascade(tmp_path_factory.mktemp("weights") / "cascade")


def upload(bucket, folder, place):
    for path in (p for p in folder.rglob("*") if p.is_file()):
        bucket.pipe_file(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_urls_survive_being_a_path():
    assert remote.url("gs://bucket/a/") == remote.url("gs:/bucket/a") == "gs://bucket/a"
    assert remote.url("s3://bucket") == "s3://bucket"
    assert remote.url("weights") is remote.url("hub:a/b") is remote.url("gs:bucket") is None


def test_the_stages_in_question_are_downloaded_once(bucket, folder):
    upload(bucket, folder, "gs://lavie/shapes")
    found = cascade.stage_folders("gs://lavie/shapes", stages=("vsr",))
    assert folder_hash(found["vsr"]) == folder_hash(folder / "vsr")
    assert not any(name.startswith("interpolation/unet") for name in bucket.got)
    bucket.got.clear()
    assert cascade.stage_folders("gs://lavie/shapes", stages=("vsr",))["vsr"] == found["vsr"] and not bucket.got
    assert locations.record("weights", found["vsr"]) == {"weights": "gs://lavie/shapes/vsr"}
    argv = ["--config=configs/moving_shapes/base.py:tiny", "--workdir=nowhere"]
    config = options.parse([*argv, "--config.init_from=gs://lavie/shapes/base"]).config
    assert folder_hash(config.init_from) == folder_hash(folder / "base")


def test_a_changed_object_is_downloaded_again(bucket, folder):
    upload(bucket, folder / "base", "s3://lavie/base")
    bucket.store["/lavie/base/unet/"] = MemoryFile(bucket, "/lavie/base/unet/")  # as a web console makes folders
    first = local_folder("s3://lavie/base")
    config = bucket.cat_file("s3://lavie/base/config.json")
    bucket.pipe_file("s3://lavie/base/config.json", config.replace(b'"guidance": 4.0', b'"guidance": 5.0'))
    second = local_folder("s3://lavie/base")
    assert first != second and folder_hash(first) == folder_hash(folder / "base") != folder_hash(second)


@pytest.mark.parametrize(
    "place, message",
    [
        ("gs://lavie/nothing", "gs://lavie/nothing does not exist, or contains no files"),
        ("gs://lavie/text", "gs://lavie/text is not a weights folder: it has no config.json"),
        ("gs://lavie/cut", "gs://lavie/cut is incomplete: unet is missing"),
        ("gs://lavie/whole", "gs://lavie/whole is incomplete: base/unet is missing"),
    ],
)
def test_places_without_weights_are_refused(place, message, bucket, folder):
    bucket.pipe_file("gs://lavie/text/a.txt", b"")
    for name in ("cut", "whole/base"):
        bucket.pipe_file(f"gs://lavie/{name}/config.json", (folder / "base/config.json").read_bytes())
    with pytest.raises(UserError, match=message):
        local_folder(place)


def test_a_missing_package_and_a_failing_store_are_one_line(bucket, monkeypatch):
    def fail(error):
        def url_to_fs(place):
            raise error

        monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)

    fail(ImportError("no gcsfs"))
    with pytest.raises(UserError, match=r"gs://lavie/a needs the package gcsfs: pip install 'lavie_jax\[gcs\]'"):
        local_folder("gs://lavie/a")
    fail(PermissionError("denied\nfor many reasons"))
    with pytest.raises(UserError, match=r"s3://lavie/a cannot be used .PermissionError: denied."):
        local_folder("s3://lavie/a")


def test_outputs_are_uploaded_and_only_what_is_missing_is_made_again(bucket, tmp_path):
    """Two machines, each with a cache of its own, write to one place."""
    mirror = remote.Mirror.of(Path("gs:/lavie/out"))
    mirror.folder.mkdir(parents=True)
    for name in (
        "0000-a-0.mp4",
        "0000-a-0.json",
        ".partial",
        "stages/0000-a-0/base.npy",
        "stages/0000-a-0/base.state.npz",
    ):
        (mirror.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.folder / name).write_text(name)
    mirror.push(leave_out=".state.npz")
    found = {name.removeprefix("/lavie/out/") for name in bucket.find("gs://lavie/out")}
    assert found == {"0000-a-0.mp4", "0000-a-0.json", "stages/0000-a-0/base.npy"}

    other = remote.Mirror(tmp_path / "other", mirror.url)
    other.pull(["0000-a-0", "0001-b-0"])
    assert (other.folder / "0000-a-0.mp4").read_text() == "0000-a-0.mp4" and not (other.folder / "stages").exists()
    bucket.rm_file("gs://lavie/out/0000-a-0.mp4")  # deleted by the user, to make it again
    mirror.pull(["0000-a-0"])
    assert not (mirror.folder / "0000-a-0.mp4").exists() and (mirror.folder / "stages/0000-a-0/base.state.npz").exists()
    mirror.push(leave_out=".state.npz")
    assert not bucket.exists("gs://lavie/out/0000-a-0.mp4")

    # The next command uploads what this one could not, and has the other machine's JSON, of the same size.
    (mirror.folder / "0001-b-0.mp4").write_text("made while the network was down")
    bucket.pipe_file("gs://lavie/out/0000-a-0.json", b"0000-B-0.json")
    later = remote.Mirror.of(Path("gs:/lavie/out"))
    later.pull(["0000-a-0", "0001-b-0"])
    assert (later.folder / "0000-a-0.json").read_text() == "0000-B-0.json"
    later.push(leave_out=".state.npz")
    assert bucket.exists("gs://lavie/out/0001-b-0.mp4") and not bucket.exists("gs://lavie/out/0000-a-0.mp4")
    bucket.rm_file("gs://lavie/out/0001-b-0.mp4")
    last = remote.Mirror.of(Path("gs:/lavie/out"))
    last.pull(["0001-b-0"])
    assert not (last.folder / "0001-b-0.mp4").exists()


def test_a_folder_is_its_own_mirror(tmp_path):
    mirror = remote.Mirror.of(tmp_path)
    mirror.pull(["a"])
    mirror.push()
    assert mirror.folder == tmp_path and not list(tmp_path.iterdir())


@pytest.mark.heavy  # samples
def test_a_sample_goes_to_a_bucket_and_is_not_made_again(bucket, folder, capsys):
    words = ["--prompt=a red circle", f"--weights={folder / 'base'}", "--steps=2", "--out=gs://lavie/samples"]
    assert sample.main(words) == 0
    names = {name.rpartition("/")[2] for name in bucket.find("gs://lavie/samples")}
    assert names == {"0000-a-red-circle-0.mp4", "0000-a-red-circle-0.json", "contact-sheet.png"}
    assert sample.main(words) == 0
    assert "1 of 1 samples exist in gs://lavie/samples" in capsys.readouterr().out
