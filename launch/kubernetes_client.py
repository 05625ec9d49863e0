"""The Kubernetes API as four requests and a watch; every refusal and every silence becomes one sentence.

Where the server is and how one proves who one is (kubeconfig, its exec plugins, certificates, a pod's rotating token)
is read by the official client, the optional package `kubernetes`; it is imported when somebody connects. Objects stay
the plain JSON that they are.
"""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

if TYPE_CHECKING:
    from urllib3 import HTTPResponse, PoolManager

REQUEST_S = 30.0
TRIES = 6  # with waits of 0.5, 1, 2, 4, 8 s between them: a leader election of the control plane passes in it
LONGEST_WAIT_S = 60.0
WATCH_S = 60  # a watch is asked for anew as often, so that a connection that died in silence is noticed
PAGE = 500
TRANSIENT = {408, 429, 500, 502, 503, 504}
_REMEDIES = {
    400: "correct the site's `kubernetes` section",
    401: "log in again, or renew the credentials of the kubeconfig",
    403: "give this account the Role of docs/kubernetes.md",
    404: "create it, or correct the site's `kubernetes` section",
    422: "correct the site's `kubernetes` section",
}


class KubernetesError(Exception):
    """The cluster refused something or does not answer. The message is one sentence with the remedy."""


class Unanswered(KubernetesError):
    """No answer, or one that asks to come again, in `wait_s`: what was asked may or may not have been done."""

    def __init__(self, said: str, wait_s: float | None = None) -> None:
        super().__init__(said)
        self.wait_s = wait_s


class Refused(KubernetesError):
    """The server's answer is final. status is HTTP's: 404 not found, 409 exists already, 410 version too old."""

    def __init__(self, asked: str, status: int, said: str) -> None:
        remedy = _REMEDIES.get(status, "see the log of the API server")
        super().__init__(f"the cluster refused to {asked}: {said} (HTTP {status}); {remedy}")
        self.status = status


class Client:
    """Requests to one API server. `headers` is asked before each request, for tokens rotate."""

    def __init__(
        self, host: str, pool: "PoolManager", headers: Callable[[], Mapping[str, str]], backoff_s: float = 0.5
    ) -> None:
        self.host = host
        self._pool = pool
        self._headers = headers
        self.backoff_s = backoff_s

    def get(self, path: str, tries: int = TRIES) -> dict[str, Any] | None:
        """An object, None if there is none."""
        try:
            return self._answered("GET", path, f"read {path}", tries=tries)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def create(
        self, path: str, manifest: Mapping[str, Any], *, only_try: bool = False, tries: int = TRIES
    ) -> dict[str, Any]:
        """Create an object and return it as it stands; `only_try` has the server check all and keep nothing."""
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if only_try else {})
        metadata = manifest["metadata"]
        asked = f"create {manifest['kind']} {metadata['name']} in namespace {metadata['namespace']}"
        return self._answered("POST", path, asked, query, manifest, tries)

    def delete(self, path: str, tries: int = TRIES) -> None:
        """Have an object deleted, itself after all that it owns. One that is gone already is no error."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
        try:
            self._answered("DELETE", path, f"delete {path}", body=body, tries=tries)
        except Refused as error:
            if error.status != 404:
                raise

    def list(self, path: str, selector: str, tries: int = TRIES) -> tuple[list[dict[str, Any]], str]:
        """All objects with these labels, and the version of the whole."""
        items: list[dict[str, Any]] = []
        query = {"labelSelector": selector, "limit": str(PAGE)}
        while True:
            page = self._answered("GET", path, f"list {path}", query, tries=tries)
            items += page["items"]
            follows = page["metadata"].get("continue")
            if not follows:
                return items, page["metadata"]["resourceVersion"]
            query["continue"] = follows

    def watch(self, path: str, selector: str, version: str) -> Iterator[dict[str, Any]]:
        """Events after `version` until the server ends the stream. Raises Refused (410: too old), Unanswered."""
        query = {"labelSelector": selector, "resourceVersion": version, "watch": "true"}
        query |= {"timeoutSeconds": str(WATCH_S), "allowWatchBookmarks": "true"}
        response = self._send("GET", path, query, None, read_s=WATCH_S + 15)
        try:
            if response.status != 200:
                raise _trouble(
                    f"watch {path}", response.status, response.data.decode(errors="replace"), response.headers
                )
            for line in self._lines(response):
                event = _parsed(line)
                if event["type"] == "ERROR":  # the status of a request that had begun well
                    raise _trouble(f"watch {path}", event["object"].get("code", 500), json.dumps(event["object"]), {})
                yield event
        finally:
            response.close()

    def _lines(self, response: "HTTPResponse") -> Iterator[bytes]:
        """Whole lines; a stream that breaks off in the middle of one is a stream that broke."""
        from urllib3.exceptions import HTTPError

        try:
            for line in response:
                if line.endswith(b"\n"):
                    yield line
        except HTTPError as error:
            raise Unanswered(f"the watch on {self.host} broke off: {error}; it is taken up again") from error

    def _answered(
        self,
        verb: str,
        path: str,
        asked: str,
        query: Mapping[str, str] | None = None,
        body: object = None,
        tries: int = TRIES,
    ) -> dict[str, Any]:
        """Ask until there is an answer to keep. Every request here may be made twice: names are the caller's choice."""
        for tried in range(1, tries + 1):
            try:
                response = self._send(verb, path, query or {}, body, read_s=REQUEST_S)
                if 200 <= response.status < 300:
                    return _parsed(response.data)
                raise _trouble(asked, response.status, response.data.decode(errors="replace"), response.headers)
            except Unanswered as error:
                if tried == tries:
                    raise Unanswered(
                        f"{error}; it was asked {tries} times: see that the API server is up, then run the same "
                        "command again"
                    ) from error
                time.sleep(min(error.wait_s or self.backoff_s * 2 ** (tried - 1), LONGEST_WAIT_S))
        raise AssertionError("the last try returns or raises")

    def _send(self, verb: str, path: str, query: Mapping[str, str], body: object, *, read_s: float) -> "HTTPResponse":
        """One request; its body is read with the answer except of a watch. Raises Unanswered."""
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError

        try:
            return self._pool.request(
                verb,
                f"{self.host}{path}" + (f"?{urlencode(query)}" if query else ""),
                headers={**self._headers(), "Accept": "application/json", "Content-Type": "application/json"},
                body=None if body is None else json.dumps(body),
                timeout=Timeout(connect=REQUEST_S, read=read_s),
                preload_content="watch" not in query,
                retries=False,
            )
        except HTTPError as error:
            raise Unanswered(f"no answer from the API server {self.host}: {error}") from error


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise Unanswered(f"the API server, or a proxy before it, answered {data[:80]!r} in place of JSON") from error


def _trouble(asked: str, status: int, said: str, headers: Mapping[str, str]) -> KubernetesError:
    """The exception of an answer that is none: to be asked again, or final."""
    with contextlib.suppress(ValueError, AttributeError):  # a proxy's page is no Status object
        said = json.loads(said).get("message") or said
    said = " ".join(said.split())[:500] or "no reason given"
    if status in TRANSIENT:
        return Unanswered(f"the cluster put off to {asked}: {said} (HTTP {status})", retry_after(headers))
    return Refused(asked, status, said)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait; Kubernetes writes them as a number. None if it asks for nothing."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def connect(context: str | None = None) -> Client:
    """A client of the cluster that this pod runs in, unless KUBECONFIG or a context names another.

    Elsewhere ~/.kube/config counts, as for kubectl. Raises KubernetesError where the package is missing or neither
    place says who we are.
    """
    if importlib.util.find_spec("kubernetes") is None:
        raise KubernetesError(
            "launcher kubernetes needs the package `kubernetes`, which is not installed: "
            "pip install 'megatron-evolve[k8s]'"
        )
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration

    found = Configuration()
    try:
        if context is None and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=found)
        else:
            file = os.environ.get("KUBECONFIG")  # the client reads it when it is imported, which may have been before
            config.load_kube_config(config_file=file, context=context, client_configuration=found)
    except (config.ConfigException, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise KubernetesError(
            f"no way to a cluster: {said}; set KUBECONFIG, correct `kubernetes.context`, or run in a pod that has a "
            "service account"
        ) from error

    def headers() -> dict[str, str]:
        token = found.auth_settings().get("BearerToken")
        return {"Authorization": token["value"]} if token and token["value"] else {}

    return Client(found.host.rstrip("/"), ApiClient(found).rest_client.pool_manager, headers)
