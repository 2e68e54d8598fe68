"""A Hub in this process: the part of its HTTP API that creating, uploading to and reading a repository needs."""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

BREAK, STALL = 0, -1  # instead of a status: the line breaks at once, or after half a minute of silence


class Hub:
    """Serves repositories from memory on a free port; `files`, `private` and `requests` tell what happened."""

    def __init__(self, token: str) -> None:
        self.token, self.files, self.objects, self.private, self.requests = token, {}, {}, {}, []
        self.refuse: dict[str, int | list[int]] = {}  # part of a path -> status of each answer, BREAK or STALL
        self.read_only: set[str] = set()  # repositories that are there, and that the token may not write to
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the names that http.server looks for)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        status = next((code for part, code in self.refuse.items() if part in path), None)
        if isinstance(status, list):  # one after the other, then all is well
            status = status.pop(0) if status else None
        if status in (BREAK, STALL):
            time.sleep(30 * (status == STALL))
            request.close_connection = True
            return None
        public = path.startswith("/storage/") or path == "/api/validate-yaml"
        if (
            status is None
            and not public
            and (request.command == "POST" or "/auth-check" in path)
            and request.headers.get("Authorization") != f"Bearer {self.token}"
        ):
            status = 401
        if status:
            return self.send(request, status, {"error": f"status {status}"})
        return self.route(request, path, body)

    def send(self, request, status, content, **headers) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def route(self, request, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self.send(request, 200, {"name": "me", "type": "user"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = repo in self.files
            if repo in self.read_only:  # the namespace is another's
                return self.send(request, 403, {"error": f"you may not create {repo}"})
            self.files.setdefault(repo, {})
            self.private.setdefault(repo, asked.get("visibility") == "private" or asked.get("private"))
            return self.send(request, 409 if known else 200, {"url": f"{self.endpoint}/{repo}"})
        if path == "/api/validate-yaml":
            return self.send(request, 200, {"errors": [], "warnings": []})
        if path.startswith("/storage/"):
            self.objects[parts[1]] = body
            return self.send(request, 200, {})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            answers = [
                {**item, "actions": {"upload": {"href": f"{self.endpoint}/storage/{item['oid']}"}}} for item in wanted
            ]
            return self.send(request, 200, {"objects": answers})
        if parts[:2] == ["api", "models"]:
            return self.model_api(request, "/".join(parts[2:4]), parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self.download(request, "/".join(parts[:2]), "/".join(parts[4:]))
        return self.send(request, 404, {"error": path})

    def model_api(self, request, repo: str, rest: list[str], body: bytes) -> None:
        if repo not in self.files:
            return self.send(request, 404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
        if repo in self.read_only and rest[:1] in (["preupload"], ["commit"], ["auth-check"]):
            return self.send(request, 403, {"error": f"you may not write to {repo}"})
        if rest == ["auth-check", "write"]:
            return self.send(request, 200, {})
        if rest[:1] == ["preupload"]:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send(request, 200, {"files": modes})
        if rest[:1] == ["commit"]:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.files[repo][entry["value"]["path"]] = self.objects[entry["value"]["oid"]]
            return self.send(
                request, 200, {"commitOid": "1" * 40, "commitUrl": f"{self.endpoint}/{repo}/commit/{'1' * 40}"}
            )
        if rest[:1] == ["tree"]:
            return self.list_files(request, repo, "/".join(rest[2:]))
        siblings = [{"rfilename": name} for name in self.files[repo]]
        return self.send(
            request, 200, {"id": repo, "sha": "1" * 40, "siblings": siblings, "private": bool(self.private[repo])}
        )

    def list_files(self, request, repo: str, under: str) -> None:
        found = [name for name in self.files[repo] if name.startswith(under + "/" if under else "")]
        if not found:
            return self.send(request, 404, {"error": under}, X_Error_Code="EntryNotFound")
        sizes = {name: len(self.files[repo][name]) for name in found}
        return self.send(
            request, 200, [{"type": "file", "path": name, "size": sizes[name], "oid": "2" * 40} for name in found]
        )

    def download(self, request, repo: str, name: str) -> None:
        content = self.files.get(repo, {}).get(name)
        if content is None:
            return self.send(request, 404, {"error": name}, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        etag = hashlib.sha256(content).hexdigest()
        return self.send(request, 200, content, ETag=f'"{etag}"', X_Repo_Commit="1" * 40)
