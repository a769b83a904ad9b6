"""A server on this machine that speaks as the Hugging Face hub does: repository, tree, and files by revision."""

import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def commit_of(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()  # noqa: S324 (git's, not a secret)


class Hub:
    """Repositories by kind and name. `asked`: the requests so far, as 'METHOD path'."""

    def __init__(self, url: str):
        self.url, self.asked = url, []
        self.commits: dict[tuple[str, str], dict[str, Files]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.status = 0  # of all answers, if not 0
        self.gated: set[str] = set()
        self.delay = 0.0  # seconds before an answer
        self.lists_siblings = True

    def push(self, kind: str, name: str, files: Files, *, commit: str = "", branch: str = "main") -> str:
        """A commit on a branch; kind: datasets or models -> the commit."""
        commits = self.commits.setdefault((kind, name), {})
        commit = commit or commit_of(len(commits))
        commits[commit] = files
        self.branches.setdefault((kind, name), {})[branch] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        words = [unquote(word) for word in urlsplit(path).path.strip("/").split("/")]
        if self.status:
            return self.status, {}, b"no"
        is_api = words[0] == "api"
        kind = words[1] if is_api else "datasets" if words[0] == "datasets" else "models"
        rest = words[2:] if is_api else words[1:] if kind == "datasets" else words
        name, action, rest = "/".join(rest[:2]), rest[2] if len(rest) > 2 else "revision", rest[3:]
        if (kind, name) not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"Repository not found"
        branches, commits = self.branches[kind, name], self.commits[kind, name]
        asked = rest[0] if rest else "main"
        if name in self.gated and action == "resolve":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        if asked not in commits and asked not in branches:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id"
        commit = branches.get(asked, asked)
        files = commits[commit]
        if action == "revision":
            siblings = [{"rfilename": file} for file in files] if self.lists_siblings else []
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        if action == "tree":
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": blob(content)}
                for file, content in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        file = "/".join(rest[1:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"Entry not found"
        return 200, {"ETag": f'"{blob(files[file])}"', "X-Repo-Commit": commit}, files[file]


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


@contextmanager
def serve() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            time.sleep(hub.delay)
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                with suppress(BrokenPipeError):  # the client gave up, as a test with a delay wants it
                    self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
