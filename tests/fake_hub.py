"""As much of the Hugging Face hub as huggingface_hub needs to upload small files and to download them again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


@contextmanager
def fake_hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Serve on a free port of this machine; gives the address, and the files by "<repository>/<path>"."""
    files: dict[str, bytes] = {}

    class Hub(BaseHTTPRequestHandler):
        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def say(self, value: object) -> None:
            self.answer(json.dumps(value).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/"):
                repository = "/".join(self.path.split("?")[0].split("/")[3:5])
                names = [name.removeprefix(f"{repository}/") for name in files if name.startswith(f"{repository}/")]
                return self.say({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            parts = self.path.lstrip("/").split("?")[0].split("/", 4)  # owner, name, "resolve", revision, path
            wanted = len(parts) == 5 and parts[2] == "resolve"
            body = files.get("/".join([*parts[:2], parts[4]])) if wanted else None
            if body is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Authorization"] == "Bearer hf_secret"
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                return self.say({"url": f"{address}/{wanted['organization']}/{wanted['name']}", "id": ""})
            if self.path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            repository = "/".join(self.path.split("/")[3:5])
            if self.path.endswith("/preupload/main"):
                wanted = json.loads(body)["files"]
                answer = {"uploadMode": "regular", "shouldIgnore": False}
                return self.say({"files": [{"path": f["path"], **answer} for f in wanted]})
            for line in map(json.loads, body.splitlines()):  # .../commit/main
                if line["key"] == "file":
                    files[f"{repository}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            self.say({"commitUrl": f"{address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, files
    finally:
        server.shutdown()
        server.server_close()
