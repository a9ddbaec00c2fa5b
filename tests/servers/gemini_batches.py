"""Files and batches of the fake Gemini: resumable upload, batchGenerateContent from a JSONL file, states, listing by pages, results."""

from __future__ import annotations

import json
import re
from typing import Any

from aiohttp import web

from tests.servers.gemini_modes import Fault
from tests.servers.gemini_service import Service

_MADE = "2026-10-01T00:00:00.000000000Z"


class Batches:
    """`answer` gives None for a path that is none of its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse | None:
        method, path = request.method, request.path
        if method == "POST" and re.fullmatch(r"/upload/[^/]+/files", path):
            return await self._upload(request)
        if method == "POST" and (found := re.fullmatch(r"/[^/]+/models/([^/:]+):batchGenerateContent", path)):
            return self._create(found.group(1), await request.json(), request.headers.get("x-goog-api-key", ""))
        if found := re.fullmatch(r"/[^/]+/files/([a-z0-9-]+)(:download)?", path):
            return self._file(method, found.group(1), bool(found.group(2)))
        if self.service.script["batch_refuses"] and re.fullmatch(r"/[^/]+/batches.*", path):
            refused = Fault(403, "PERMISSION_DENIED", "The caller does not have permission.")
            return web.json_response(refused.body(request.headers.get("x-goog-api-key", "")), status=refused.status)
        if method == "GET" and re.fullmatch(r"/[^/]+/batches", path):
            return self._list(request)
        if found := re.fullmatch(r"/[^/]+/batches/([a-z0-9-]+)(:cancel)?", path):
            return self._job(method, found.group(1), bool(found.group(2)))
        return None

    async def _upload(self, request: web.Request) -> web.Response:
        if "start" in request.headers["X-Goog-Upload-Command"]:
            name = f"up{len(self.files)}"
            self.files[name] = b""
            url = f"{request.scheme}://{request.host}{request.path}?upload_id={name}&upload_protocol=resumable"
            return web.Response(headers={"X-Goog-Upload-URL": url, "X-Goog-Upload-Status": "active"})
        if self.service.script["upload_elsewhere"]:
            return web.Response(status=307, headers={"Location": self.service.script["elsewhere"]})
        name = request.query["upload_id"]
        assert int(request.headers["X-Goog-Upload-Offset"]) == len(self.files[name])
        self.files[name] += await request.read()
        final = "finalize" in request.headers["X-Goog-Upload-Command"]
        return web.json_response({"file": self._described(name)}, headers={"X-Goog-Upload-Status": "final" if final else "active"})

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "name": f"files/{name}",
            "mimeType": "jsonl",
            "sizeBytes": str(len(self.files[name])),
            "createTime": _MADE,
            "state": "ACTIVE",
            "source": "UPLOADED",
        }

    def _file(self, method: str, name: str, download: bool) -> web.Response | None:
        if name not in self.files:
            return None
        if method == "DELETE":
            del self.files[name]
            return web.json_response({})
        return web.Response(body=self.files[name]) if download else web.json_response(self._described(name))

    def _create(self, model: str, body: dict[str, Any], key: str) -> web.Response | None:
        batch = body["batch"]
        source = batch["inputConfig"]["fileName"].removeprefix("files/")
        if source not in self.files:
            return None
        room = self.service.script["batch_room"]
        if room and sum(job["state"] in ("PENDING", "RUNNING") for job in self.jobs.values()) >= room:
            full = Fault(429, "RESOURCE_EXHAUSTED", "Too many batch jobs are enqueued.")
            return web.json_response(full.body(key), status=full.status)
        name = f"b{len(self.jobs)}"
        self.jobs[name] = {
            "model": model,
            "display": batch["displayName"],
            "file": source,
            "key": key,
            "polls": 0,
            "state": "PENDING",
            "output": "",
        }
        return web.json_response(self._operation(name))

    def _operation(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        metadata: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": f"models/{job['model']}",
            "displayName": job["display"],
            "inputConfig": {"fileName": f"files/{job['file']}"},
            "createTime": _MADE,
            "updateTime": _MADE,
            "state": f"BATCH_STATE_{job['state']}",
            "name": f"batches/{name}",
        }
        operation: dict[str, Any] = {"name": f"batches/{name}", "metadata": metadata}
        if job["state"] not in ("PENDING", "RUNNING"):
            operation["done"] = True
            metadata["endTime"] = _MADE
        if job["output"]:
            metadata["output"] = {"responsesFile": f"files/{job['output']}"}
            operation["response"] = {"@type": metadata["@type"] + "Output", **metadata["output"]}
        if job["state"] in ("FAILED", "CANCELLED", "EXPIRED"):
            operation["error"] = {"code": 13, "message": f"the job is {job['state']}"}
        return operation

    def _list(self, request: web.Request) -> web.Response:
        """Newest first, by pages."""
        size, begin = int(request.query.get("pageSize", "10")), int(request.query.get("pageToken", "0"))
        names = list(self.jobs)[::-1]
        for name in names[begin : begin + size]:
            self._looked_at(name)
        told: dict[str, Any] = {"operations": [self._operation(name) for name in names[begin : begin + size]]}
        if begin + size < len(names):
            told["nextPageToken"] = str(begin + size)
        return web.json_response(told)

    def _job(self, method: str, name: str, cancel: bool) -> web.Response | None:
        if name not in self.jobs or self.service.script["batch_forgets"]:
            return None
        job = self.jobs[name]
        if method == "DELETE":
            del self.jobs[name]
            return web.json_response({})
        if cancel:
            job["state"] = "CANCELLED"
            return web.json_response({})
        self._looked_at(name)
        return web.json_response(self._operation(name))

    def _looked_at(self, name: str) -> None:
        """Time goes on by being asked: after `batch_polls` looks, alone or in a listing, a job has ended."""
        job = self.jobs[name]
        job["polls"] += 1
        if job["state"] in ("PENDING", "RUNNING"):
            job["state"] = "RUNNING"
            if job["polls"] >= self.service.script["batch_polls"]:
                self._work(name)

    def _work(self, name: str) -> None:
        job, script = self.jobs[name], self.service.script
        ends = script["batch_end"]
        job["state"] = ends if isinstance(ends, str) else ends.pop(0) if ends else "SUCCEEDED"
        if job["state"] in ("FAILED", "CANCELLED"):
            return
        lines = self.files[job["file"]].decode().splitlines()
        done = len(lines) if job["state"] == "SUCCEEDED" else int(len(lines) * script["batch_done"])
        written = []
        for line in lines[:done]:
            asked = json.loads(line)
            written.append(json.dumps({"key": asked["key"], **self.service.line(asked["request"], job["model"], job["key"])}))
        if written:
            job["output"] = f"{name}-results"
            self.files[job["output"]] = "\n".join(written).encode()
