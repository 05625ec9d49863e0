"""An API server of Kubernetes over real HTTP, as far as a launcher meets it, with troubles on demand; and a kubelet.

It stores objects with versions, refuses what exists, lists by labels in pages, and streams a watch. What it is told by
`fail` happens to the next requests that fit. Its kubelet runs the containers' real commands as processes here.
"""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from megatron_evolve.launch.job import Job
from megatron_evolve.launch.kubernetes_manifest import object_name

Object = dict[str, Any]

JOBS = "/apis/batch/v1/namespaces/here/jobs"
PODS = "/api/v1/namespaces/here/pods"
CLAIM = "/api/v1/namespaces/here/persistentvolumeclaims/work"


@dataclass
class Fault:
    """What happens to a request: an answer (status), or none (0). `after` lets it do its work first."""

    verb: str
    part: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "as the test wants it"
    after: bool = False


class FakeCluster:
    """Objects by path, the events that led to them, and every request as `VERB path?query`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.objects: dict[str, Object] = {}
        self.events: list[tuple[int, str, str, Object]] = []  # version, collection, type, object
        self.version = 100
        self.oldest = 0  # a watch from before this is Gone
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.tokens: list[str | None] = []
        self.cuts = 0  # raised to break every watch off

    def fail(self, verb: str, part: str, status: int, times: int = 1, **fields: Any) -> None:
        with self.changed:
            self.faults += [Fault(verb, part, status, **fields)] * times

    def cut_watches(self) -> None:
        with self.changed:
            self.cuts += 1
            self.changed.notify_all()

    def forget_events(self) -> None:
        """As after a compaction: no watch can go on from before now."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self.events.clear()

    def put(self, path: str, found: Object, kind: str = "MODIFIED") -> Object:
        """Store an object and tell the watches."""
        with self.changed:
            self.version += 1
            found = copy.deepcopy(found)
            found["metadata"]["resourceVersion"] = str(self.version)
            if kind == "DELETED":
                self.objects.pop(path, None)
            else:
                self.objects[path] = found
            self.events.append((self.version, path.rsplit("/", 1)[0], kind, found))
            self.changed.notify_all()
            return found

    def add(self, collection: str, found: Object) -> Object:
        found["metadata"].setdefault("creationTimestamp", datetime.now(UTC).isoformat())
        return self.put(f"{collection}/{found['metadata']['name']}", found, "ADDED")

    def find(self, part: str) -> list[str]:
        with self.changed:
            return [path for path in self.objects if part in path]

    def condition(self, path: str, kind: str, reason: str = "", message: str = "") -> None:
        """Give an object a true condition."""
        found = copy.deepcopy(self.objects[path])
        conditions = found.setdefault("status", {}).setdefault("conditions", [])
        conditions.append({"type": kind, "status": "True", "reason": reason, "message": message})
        self.put(path, found)

    def delete(self, path: str) -> None:
        self.put(path, self.objects[path], "DELETED")

    # --- the kubelet -------------------------------------------------------------------------------------------------

    def add_pod(self, job_path: str, index: int = 0, **status: Any) -> str:
        """A pod of a Job, pending or as `status` says; returns its path."""
        job = self.objects[job_path]
        namespace = job_path.split("/")[-3]
        metadata = {"name": f"{job['metadata']['name']}-{index}-x", "labels": job["metadata"]["labels"]}
        pod = {"metadata": metadata, "spec": {"nodeName": f"node{index}"}, "status": {"phase": "Pending", **status}}
        self.add(f"/api/v1/namespaces/{namespace}/pods", pod)
        return f"/api/v1/namespaces/{namespace}/pods/{metadata['name']}"

    def start(self, job_path: str, index: int = 0, wrapped: tuple[str, ...] = ()) -> subprocess.Popen:
        """Run the command of a Job's container in a session of its own; `wrapped` is a command that runs it."""
        (container,) = self.objects[job_path]["spec"]["template"]["spec"]["containers"]
        env = os.environ | {"JOB_COMPLETION_INDEX": str(index)}
        return subprocess.Popen([*wrapped, *container["command"]], env=env, start_new_session=True)


@contextlib.contextmanager
def serving(cluster: FakeCluster, port: int = 0) -> Iterator[str]:
    """The cluster's server on this machine; yields its address."""
    over = threading.Event()
    handler = type("Bound", (_Handler,), {"cluster": cluster, "over": over})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()  # connections that are kept open end too
        server.shutdown()
        server.server_close()
        cluster.cut_watches()


def job_path(job: Job, attempt: int = 1) -> str:
    return f"{JOBS}/{object_name(job, attempt)}"


def end(process: subprocess.Popen, signum: int = signal.SIGTERM) -> int:
    process.send_signal(signum)
    return process.wait(20)


class _Handler(BaseHTTPRequestHandler):
    cluster: FakeCluster
    over: threading.Event
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, verb: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.over.is_set():
            return self._break(Fault(verb, "", 0))
        cluster, url = self.cluster, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with cluster.changed:
            cluster.requests.append(f"{verb} {self.path}")
            cluster.tokens.append(self.headers.get("Authorization"))
            fault = next((one for one in cluster.faults if one.verb == verb and one.part in self.path), None)
            if fault is not None:
                cluster.faults.remove(fault)
        if fault is not None and not fault.after:
            return self._break(fault)
        if query.get("watch"):
            return self._watch(url.path, query)
        status, answer = self._answer(verb, url.path, query, json.loads(body or b"{}"))
        if fault is not None:
            return self._break(fault)
        return self._say(status, answer)

    def _answer(self, verb: str, path: str, query: dict[str, str], body: Object) -> tuple[int, Object]:
        cluster = self.cluster
        if verb == "POST":
            target = f"{path}/{body['metadata']['name']}"
            if target in cluster.objects:
                return 409, status_object(409, f'jobs.batch "{body["metadata"]["name"]}" already exists')
            return 201, body if query.get("dryRun") else cluster.add(path, body)
        if verb == "GET" and "labelSelector" in query:
            return 200, self._page(path, query)
        if path not in cluster.objects:
            return 404, status_object(404, f'"{path.rsplit("/", 1)[1]}" not found')
        if verb == "DELETE":
            cluster.delete(path)
        return 200, cluster.objects.get(path, status_object(200, "deleted"))

    def _page(self, path: str, query: dict[str, str]) -> Object:
        with self.cluster.changed:
            wanted = _labels(query)
            found = [
                one
                for name, one in sorted(self.cluster.objects.items())
                if name.rsplit("/", 1)[0] == path and _fits(one, wanted)
            ]
            first, size = int(query.get("continue", "0")), min(int(query["limit"]), 3)
            metadata = {"resourceVersion": str(self.cluster.version)}
            if first + size < len(found):
                metadata["continue"] = str(first + size)
            return {"items": found[first : first + size], "metadata": metadata}

    def _watch(self, path: str, query: dict[str, str]) -> None:
        cluster, version, wanted = self.cluster, int(query["resourceVersion"]), _labels(query)
        self._begin(200, {"Transfer-Encoding": "chunked"})
        if version < cluster.oldest:
            self._chunk({"type": "ERROR", "object": status_object(410, f"too old resource version: {version}")})
            return self._chunk(None)
        cuts, deadline = cluster.cuts, time.monotonic() + float(query["timeoutSeconds"])
        while time.monotonic() < deadline:
            with cluster.changed:
                new = [event for event in cluster.events if event[0] > version]
                if not new and cluster.cuts == cuts:
                    cluster.changed.wait(0.1)
            if cluster.cuts != cuts:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                self.close_connection = True
                return self.connection.close()
            for number, collection, kind, found in new:
                version = number
                if collection == path and _fits(found, wanted):
                    self._chunk({"type": kind, "object": found})
        return self._chunk(None)

    def _chunk(self, event: Object | None) -> None:
        data = b"" if event is None else json.dumps(event).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    def _break(self, fault: Fault) -> None:
        if fault.status:
            return self._say(fault.status, status_object(fault.status, fault.message), fault.headers)
        self.close_connection = True
        return self.connection.shutdown(socket.SHUT_RDWR)

    def _say(self, status: int, answer: Object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self._begin(status, {"Content-Length": str(len(data)), **(headers or {})})
        self.wfile.write(data)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def status_object(code: int, message: str) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "code": code, "message": message}


def _labels(query: dict[str, str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in query["labelSelector"].split(","))


def _fits(found: Object, wanted: dict[str, str]) -> bool:
    return wanted.items() <= found["metadata"].get("labels", {}).items()
