"""A fake endpoint that speaks the OpenAI protocol over real HTTP and goes wrong where it is told to.

In the tests' process (`FakeEndpoint`), or as a server of its own, by this file's command line:

    python fake_endpoint.py --port N --name MODEL --lives FOLDER [--first-life FAULT ...] [--every-life FAULT ...]

A fault is `WHERE:WHAT`: the number of the completion request, from 0, or `all`, and what happens there. Standard
library only, since it stands for other people's code.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 4


def answer_of(prompt: Any) -> str:
    """What the fake answers to a prompt: text, token ids or messages."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return f"{len(text)} letters, the last ones are {text[-6:]!r}"


def pieces_of(prompt: Any, max_tokens: int) -> tuple[list[str], str, int]:
    """The answer in pieces, one a token; why it ends; how many tokens, the end token included."""
    answer = answer_of(prompt)
    pieces = [answer[at : at + PIECE] for at in range(0, len(answer), PIECE)]
    if len(pieces) >= max_tokens:
        return pieces[:max_tokens], "length", max_tokens
    return pieces, "stop", len(pieces) + 1


class FakeEndpoint(ThreadingHTTPServer):
    """The server. `faults` by number of the completion request; `requests` is what was asked, in order."""

    daemon_threads = True

    def __init__(
        self, name: str, faults: Iterable[str] = (), *, port: int = 0, listed: Iterable[str] = (), **card: Any
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.name = name
        self.card = card  # what it says of every model beside its name
        self.listed = [*listed] or [name]
        self.faults = dict(fault.split(":", 1) for fault in faults)
        self.adapters: list[str] = []  # folders that were loaded
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()
        self.turn = threading.Lock()  # for `queue`: one request at a time
        self.released = threading.Event()  # ends what hangs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "FakeEndpoint":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fake/1", ""

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self.server.faults.get("models") == "nonsense":
                return self._reply(200, {"hello": "there"})
            if "models" in self.server.faults:
                return self._reply(int(self.server.faults["models"]), {"error": {"message": "no"}})
            common = {"object": "model", "created": 0, "owned_by": "fake", **self.server.card}
            cards = [{"id": name, **common} for name in self.server.listed]
            return self._reply(200, {"object": "list", "data": cards})
        if self.path == "/version":
            return self._reply(200, {"version": "0.0.fake"})
        return self._reply(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        if self.path.endswith("_lora_adapter"):
            return self._adapter(self.path.rsplit("/", 1)[1].split("_")[0], body)
        with server.lock:
            number = len(server.requests) - 1  # the first one is the warm-up
            server.requests.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            fault = server.faults.get("warm-up" if number < 0 else str(number)) or (
                number >= 0 and server.faults.get("all", "")
            )
            self._complete(body, fault or "")
        finally:
            with server.lock:
                server.at_once -= 1

    def _adapter(self, verb: str, body: dict[str, Any]) -> None:
        """As vLLM's runtime LoRA updates: a folder is loaded under a name once, and must be loaded to be unloaded."""
        name, listed = body["lora_name"], self.server.listed
        if "lora" in self.server.faults or (name in listed) == (verb == "load"):
            return self._reply(404 if verb == "unload" else 400, {"error": {"message": f"cannot {verb} {name}"}})
        if verb == "load":
            self.server.adapters.append(body["lora_path"])
        listed.append(name) if verb == "load" else listed.remove(name)
        return self._reply(200, {})

    def _complete(self, body: dict[str, Any], fault: str) -> None:
        if fault.isdigit():
            return self._reply(int(fault), {"error": {"message": f"told to answer {fault}"}})
        if fault.startswith("retry-after="):
            return self._reply(429, {"error": {"message": "busy"}}, {"Retry-After": fault.split("=")[1]})
        if fault == "die":
            os._exit(3)
        if fault == "queue":
            with self.server.turn:
                return self._stream(body, "slow")
        return self._stream(body, fault)

    def _stream(self, body: dict[str, Any], fault: str) -> None:
        chat = "messages" in body
        pieces, reason, num_tokens = pieces_of(body.get("prompt", body.get("messages")), body["max_tokens"])
        model = "somebody-else" if fault == "wrong-model" else body["model"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, piece in enumerate(pieces):
            if number == 2:
                if fault == "cut":
                    return self._chunk(b"")
                if fault == "drop":
                    self.close_connection = True
                    return self.connection.close()
                if fault == "hang":
                    self.server.released.wait()
                    return None
                if fault == "error-event":
                    self._event({"error": {"message": "told to fail"}})
                    return self._chunk(b"")
            if fault == "slow":
                time.sleep(0.03)
            text = {"delta": {"content": piece}} if chat else {"text": piece}
            self._event({"model": model, "choices": [{"index": 0, "finish_reason": None, **text}]})
        last = {"delta": {}} if chat else {"text": ""}
        self._event({"model": model, "choices": [{"index": 0, "finish_reason": reason, **last}]})
        if fault != "no-usage":
            usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": num_tokens + 1}
            self._event({"model": model, "choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        return self._chunk(b"")

    def _event(self, document: dict[str, Any]) -> None:
        self._chunk(
            f"data: {json.dumps({'id': 'x', 'object': 'text_completion', 'created': 0, **document})}\n\n".encode()
        )

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _reply(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """A server of its own. Each start leaves a file in `--lives`, named by its number, with its and its child's pid."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--lives", type=Path, required=True)
    parser.add_argument("--first-life", nargs="*", default=[])
    parser.add_argument("--every-life", nargs="*", default=[])
    parser.add_argument("--stubborn", action="store_true")
    arguments = parser.parse_args()
    life = len(list(arguments.lives.iterdir()))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if arguments.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faults = [*arguments.every_life, *([] if life else arguments.first_life)]
    print(f"life {life}", flush=True)
    if "start:never" in faults:
        (arguments.lives / str(life)).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    server = FakeEndpoint(arguments.name, faults, port=arguments.port)
    (arguments.lives / str(life)).write_text(f"{os.getpid()} {child.pid}")
    server.serve_forever(poll_interval=0.01)


if __name__ == "__main__":
    main()
