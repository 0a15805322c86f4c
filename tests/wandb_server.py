"""A local stand-in for W&B's server: it accepts everything, and gives a resumed run its history."""

from __future__ import annotations

import gzip
import json
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class RunSeen:
    """What the server knows of one run."""

    fields: dict[str, Any] = field(default_factory=dict)  # displayName, groupName, jobType, project, … as last sent
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by the row's place in the run
    summary: dict[str, Any] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    starts: int = 0

    def curve(self, name: str) -> list[Any]:
        """The values of one metric, in the order that they have on the server."""
        return [row[name] for _, row in sorted(self.history.items()) if name in row]


class Server:
    """Speaks as much of the undocumented protocol as wandb 0.31 needs for online runs and `wandb sync`."""

    def __init__(self) -> None:
        self.runs: dict[str, RunSeen] = defaultdict(RunSeen)
        self.files: list[str] = []
        handler = type("Handler", (_Handler,), {"server_seen": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def account(self) -> dict[str, str]:
        """The environment of a user of this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40}

    def close(self) -> None:
        """Stop serving."""
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, data: bytes) -> dict[str, Any]:
        """The answer to a request, by its path and GraphQL operation."""
        if "file_stream" in path:
            return self._stream(self.runs[path.split("/")[-2]], json.loads(data))
        if not path.endswith("/graphql"):
            return {}
        query = json.loads(data)
        text, variables = query["query"], query.get("variables") or {}
        if "mutation UpsertBucket" in text:
            return {"data": {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}}
        if "query RunResumeStatus" in text:
            return {"data": {"model": self._resumed(variables)}}
        if "CreateRunFiles" in text:
            self.files += variables.get("files", [])
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in variables.get("files", [])]
            return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        if "mutation CreateArtifact" in text:  # a table; it is said to be there already, so nothing is uploaded
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        info = {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}
        return {"data": {"viewer": viewer, "serverInfo": info, "model": None, "project": None}}

    def _stream(self, run: RunSeen, sent: dict[str, Any]) -> dict[str, Any]:
        for name, part in (sent.get("files") or {}).items():
            rows = [json.loads(row) for row in part.get("content", [])]
            if name == "wandb-history.jsonl":
                run.history.update(enumerate(rows, part["offset"]))
            if name == "wandb-summary.json" and rows:
                run.summary = rows[-1]
        if sent.get("exitcode") is not None:
            run.exits.append(sent["exitcode"])
        return {"exitcode": None, "limits": {}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        if name := variables.get("name"):
            run = self.runs[name]
            run.starts += "displayName" in variables
            run.fields |= {key: value for key, value in variables.items() if value is not None}
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}}
        return {"id": "r", "name": name, "displayName": "d", "config": "{}", "project": project, "historyLineCount": 0}

    def _resumed(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        if variables["name"] not in self.runs:
            return None
        run = self.runs[variables["name"]]
        rows = [json.dumps(row) for _, row in sorted(run.history.items())]
        bucket = {
            "id": "r",
            "name": variables["name"],
            "displayName": run.fields.get("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": "[]",
            "config": run.fields.get("config") or "{}",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}, "bucket": bucket}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_seen: Server

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client hangs up when it has what it wants
            super().handle()

    def reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        self.body()
        self.reply({})

    def do_POST(self) -> None:
        self.reply(self.server_seen.answer(self.path, self.body()))
