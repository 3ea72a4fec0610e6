"""
As much of the Hugging Face Hub as an upload and a download need, in memory, on a port of this machine. It can be told
to fail.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


WRITE, READ = "hf_write", "hf_read"


class Hub:
    """
    The server, as a context manager.

    Attributes:
        url (`str`): what `HF_ENDPOINT` has to be.
        repos (`dict`): files of each repository by path.
        commits (`list`): repository, message and paths of each commit.
        uploads (`list`): SHA-256 of each large file that came over whole.
        failures (`list`): `(method, part of the path, what)` of requests to fail, each once and in this order: `what`
            is a status, or `"drop"` = the connection is closed in the middle of the body.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.large: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.failures: list[tuple[str, str, int | str]] = []

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr([commit for commit in self.commits if commit[0] == repo]).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, content=b"", status: int = 200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self, part: float = 1.0) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(part * int(self.headers.get("Content-Length", 0))))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if part < 1:
                return body
        self.rfile.readline()
        return body

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        for index, (method, part, what) in enumerate(self.hub.failures):
            if method == self.command and part in path:
                del self.hub.failures[index]
                if isinstance(what, int):
                    self.read_body()
                    return self.answer({"error": "told to fail"}, what)
                self.read_body(0.5)
                self.close_connection = True
                return None
        body = self.read_body()
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *match.groups())
        return self.answer({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def may(self, right: str) -> bool:
        """Whether the token has the right; if not, that is answered."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITE, READ):
            self.answer({"error": "Invalid username or password."}, 401)
            return False
        if right == WRITE and token == READ:
            self.answer({"error": "You don't have the rights to do this."}, 403)
            return False
        return True

    def create(self, body):
        request = json.loads(body)
        repo = f"{request['organization'] or 'me'}/{request['name']}"
        if self.may(WRITE):
            exists = repo in self.hub.repos
            self.hub.repos.setdefault(repo, {})
            self.answer({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)

    def auth_check(self, body, repo, right):
        if self.may(WRITE if right else READ):
            self.answer()

    def validate_yaml(self, body):
        metadata = json.loads(body)["content"].split("---")[1]
        names = re.findall(r"^(?:datasets|base_model): *(\S+)|^- (\S+\.jsonl)", metadata, re.MULTILINE)
        bad = [name for pair in names for name in pair if name and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
        errors = [{"message": f'"{name}" is not valid. Use an id from the Hub.'} for name in bad]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, repo):
        if not self.may(WRITE):
            return
        modes = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith((".safetensors", ".bin", ".png", ".parquet")) else "regular"
            data = self.hub.repos[repo].get(path)
            oid = None if data is None else _git_oid(data) if mode == "regular" else hashlib.sha256(data).hexdigest()
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def lfs_batch(self, body, repo):
        if not self.may(WRITE):
            return
        objects = [
            {"oid": item["oid"], "size": item["size"]}
            | (
                {}
                if item["oid"] in self.hub.large
                else {"actions": {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}}
            )
            for item in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def put_large(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "checksum"}, 400)
        self.hub.large[oid] = body
        self.hub.uploads.append(oid)
        return self.answer()

    def commit(self, body, repo):
        if not self.may(WRITE):
            return
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            is_large = operation["key"] == "lfsFile"
            files[value["path"]] = self.hub.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        self.hub.repos[repo].update(files)
        self.hub.commits.append((repo, header["value"]["summary"], sorted(files)))
        sha = self.hub.sha(repo)
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, body, repo):
        if repo not in self.hub.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in self.hub.repos[repo]]
        return self.answer({"id": repo, "sha": self.hub.sha(repo), "siblings": siblings, "tags": [], "private": False})

    def tree(self, body, repo):
        files = self.hub.repos[repo].items()
        self.answer([{"type": "file", "path": p, "size": len(data), "oid": _git_oid(data)} for p, data in files])

    def resolve(self, body, repo, path):
        sha = self.hub.sha(repo)
        data = self.hub.repos.get(repo, {}).get(path)
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self.answer(data, ETag=f'"{_git_oid(data)}"', X_Repo_Commit=sha)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (f"GET /api/models/{REPO}/auth-check(/write)?", Handler.auth_check),
    (f"POST /api/(?:models|datasets)/{REPO}/preupload/main", Handler.preupload),
    (f"POST /(?:datasets/)?{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT /large/([0-9a-f]+)", Handler.put_large),
    (f"POST /api/(?:models|datasets)/{REPO}/commit/main", Handler.commit),
    (f"GET /api/models/{REPO}/tree/[^/]+", Handler.tree),
    (f"GET /api/models/{REPO}(?:/revision/[^/]+)?", Handler.info),
    (f"(?:GET|HEAD) /{REPO}/resolve/[^/]+/(.+)", Handler.resolve),
]
