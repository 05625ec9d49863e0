"""A mirror of the cluster's objects of one kind that carry our label: one list, then a watch from there on.

    list (version v) --> watch after v --> events, each with a newer v --> stream ends --> watch after the last v
                  ^                                                                              |
                  '--------------------- 410 Gone: v is older than the server remembers <--------'

A thread of its own keeps it, so that asking costs no request. While the server is silent the last known state holds.
"""

import threading
import time
from types import TracebackType
from typing import Any

from megatron_evolve.launch.kubernetes_client import LONGEST_WAIT_S, Client, KubernetesError, Refused, Unanswered

GONE = 410
PATIENCE_S = 900.0  # an upgrade of the control plane may take minutes; jobs run on through it


class Mirror:
    """The objects under `path` with the labels of `selector`, by name. Use it within `with`."""

    def __init__(self, client: Client, path: str, selector: str, patience_s: float = PATIENCE_S) -> None:
        self._client = client
        self._path = path
        self._selector = selector
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._objects: dict[str, dict[str, Any]] = {}
        self._heard = time.monotonic()
        self._trouble: KubernetesError | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"mirror of {path}", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()  # the thread ends with the next word from the server, or with us

    def check(self) -> None:
        """Raises KubernetesError once the server refused, or was silent for `patience_s`."""
        with self._lock:
            trouble, silent_s = self._trouble, time.monotonic() - self._heard
        if isinstance(trouble, Refused) or (trouble is not None and silent_s > self._patience_s):
            raise KubernetesError(
                f"{trouble}; heard nothing of the jobs for {silent_s:.0f} s: they run on, and the same command "
                "goes on with them"
            ) from trouble
        if trouble is None and self._thread.ident is not None and not self._thread.is_alive():
            raise KubernetesError(f"the {self._thread.name} broke, as told above: run the same command again")

    def objects(self) -> dict[str, dict[str, Any]]:
        """All that is known now."""
        with self._lock:
            return dict(self._objects)

    def get(self, name: str) -> dict[str, Any] | None:
        """One object as last heard of; None proves nothing: it may be newer than the last event."""
        with self._lock:
            return self._objects.get(name)

    def _keep(self) -> None:
        version, failures = None, 0
        while not self._closing.is_set():
            try:
                version = self._list() if version is None else version
                for event in self._client.watch(self._path, self._selector, version):
                    version, failures = self._apply(event), 0
                    if self._closing.is_set():
                        return
                self._note(None)
                wait_s, failures = None, 0
            except Refused as error:
                self._note(error if error.status != GONE else None)
                if error.status != GONE:
                    return
                version, wait_s = None, None
            except Unanswered as error:
                self._note(error)
                wait_s = error.wait_s
            self._closing.wait(min(wait_s or self._client.backoff_s * 2**failures, LONGEST_WAIT_S))
            failures = min(failures + 1, 8)

    def _list(self) -> str:
        items, version = self._client.list(self._path, self._selector)
        with self._lock:
            self._objects = {found["metadata"]["name"]: found for found in items}
        self._note(None)
        return version

    def _apply(self, event: dict[str, Any]) -> str:
        found = event["object"]
        with self._lock:
            if event["type"] == "DELETED":
                self._objects.pop(found["metadata"]["name"], None)
            elif event["type"] != "BOOKMARK":
                self._objects[found["metadata"]["name"]] = found
        self._note(None)
        return found["metadata"]["resourceVersion"]

    def _note(self, trouble: KubernetesError | None) -> None:
        with self._lock:
            self._trouble = trouble
            if trouble is None:
                self._heard = time.monotonic()
