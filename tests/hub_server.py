"""A stand-in for the Hugging Face hub: the requests that huggingface_hub makes to list, download and upload files."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories, each a list of commits, {file: content}. `requests` are the methods and paths of all requests."""

    def __init__(self):
        self.commits, self.tags, self.denied = {}, {}, {}  # denied: {repository: (status, code of the error)}
        self.requests, self.uploads, self.token, self.down = [], {}, "hf_test", False

    def add(self, repository, files):
        """Adds a commit with these files, {name: bytes}, and returns its hash."""
        before = self.commits.setdefault(repository, [])
        commit = hashlib.sha1(f"{repository} {len(before)}".encode()).hexdigest()
        before.append((commit, {**(before[-1][1] if before else {}), **files}))
        return commit

    def add_folder(self, repository, folder, prefix=""):
        names = (path for path in folder.rglob("*") if path.is_file())
        return self.add(repository, {f"{prefix}{p.relative_to(folder).as_posix()}": p.read_bytes() for p in names})

    def find(self, repository, revision):
        """(commit, files) of a revision, or None."""
        commits = self.commits[repository]
        if revision == "main":
            return commits[-1]
        return next((c for c in commits if c[0] == self.tags.get((repository, revision), revision)), None)

    def downloads(self):
        """The files that were downloaded, without the commit."""
        found = (re.match(r"GET (.+)/resolve/[^/]+/(.+)", line) for line in self.requests)
        return [f"{match[1].strip('/')}/{match[2]}" for match in found if match]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        pass

    def reply(self, status, content=b"", headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.down:
            return self.reply(503)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, *match.groups())
        self.refuse(404, "RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def revision(self, repository, revision):
        """(commit, files), or None after an error was sent."""
        if repository not in self.hub.commits:
            self.refuse(401, "RepoNotFound")
        elif (found := self.hub.find(repository, revision or "main")) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return found

    def info(self, _, repository, revision):
        if found := self.revision(repository, revision):
            siblings = [{"rfilename": name} for name in sorted(found[1])]
            self.reply(200, {"id": repository, "sha": found[0], "siblings": siblings})

    def tree(self, _, repository, revision):
        if found := self.revision(repository, revision):
            self.reply(
                200,
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in sorted(found[1].items())
                ],
            )

    def resolve(self, _, repository, revision, name):
        if repository in self.hub.denied:
            return self.refuse(*self.hub.denied[repository])
        if not (found := self.revision(repository, revision)):
            return
        commit, files = found
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, etag = files[name], f'"{hashlib.sha1(files[name]).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            total, content = len(content), content[int(start[1]) :]
            return self.reply(206, content, headers | {"Content-Range": f"bytes {start[1]}-{total - 1}/{total}"})
        self.reply(200, content, headers)

    def logged_in(self):
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self.reply(401, {"error": "Invalid username or password."})
        return False

    def whoami(self, _):
        if self.logged_in():
            self.reply(200, {"type": "user", "name": "someone", "auth": {"accessToken": {}}})

    def create(self, body):
        if not self.logged_in():
            return
        fields = json.loads(body)
        repository = f"{fields.get('organization') or 'someone'}/{fields['name']}"
        if repository in self.hub.commits:
            return self.reply(409, {"error": "exists", "url": repository})
        self.hub.add(repository, {".gitattributes": b""})
        self.reply(200, {"url": f"http://{self.headers['Host']}/{repository}", "id": repository})

    def preupload(self, body, repository, revision):
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def lfs(self, body, repository):
        objects = json.loads(body)["objects"]
        url = f"http://{self.headers['Host']}/upload/"
        actions = [{**one, "actions": {"upload": {"href": url + one["oid"], "header": {}}}} for one in objects]
        self.reply(200, {"transfer": "basic", "objects": actions})

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads[oid] = body
        self.reply(200)

    def commit(self, body, repository, revision):
        if not self.logged_in():
            return
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.add(repository, files)
        url = f"http://{self.headers['Host']}/{repository}/commit/{commit}"
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"POST /api/validate-yaml", lambda self, _: self.reply(200, {"errors": [], "warnings": []})),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (rf"GET /api/models/{NAME}(?:/revision/([^/]+))?", Handler.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs),
    (r"PUT /upload/(\w+)", Handler.put),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)


@contextlib.contextmanager
def serving():
    """Yields (a hub, its address)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.hub = True, Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
