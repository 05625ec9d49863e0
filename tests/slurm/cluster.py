"""A Slurm of several nodes on this machine, for tests: real daemons on loopback, gone with the test session.

Needs root, Slurm's programs and munge, and a kernel that lets root open namespaces; `Cluster.start` says what is
missing. Every process of the cluster lives below one `unshare`, whose end ends them all.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "srun", "scancel", "scontrol", "unshare", "nsenter")
START_S = 60.0  # 2 s on an idle machine


class Unavailable(Exception):
    """This machine cannot run the cluster; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `root` holds its configuration and logs; `process` is the `unshare` that all hangs from."""

    root: Path
    process: subprocess.Popen

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    @classmethod
    def start(cls, root: Path, *, nodes: int, cpus: int) -> "Cluster":
        """Raises Unavailable where there is no root, no Slurm or no namespaces."""
        path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
        missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
        if missing:
            raise Unavailable(f"{', '.join(missing)} not found: install slurm-wlm and munge")
        if os.geteuid() != 0:
            raise Unavailable("Slurm's daemons on one machine need root")
        root.mkdir(parents=True)
        words = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"]
        words += [str(Path(__file__).with_name("inside.sh")), str(root), str(nodes), str(cpus), str(_free_ports(nodes))]
        with open(root / "start.log", "w") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "PATH": path}
            )
        cluster = cls(root, process)
        end = time.monotonic() + START_S
        while not (root / "ready").exists():
            if process.poll() is not None or time.monotonic() > end:
                cluster.stop()
                raise Unavailable(f"it did not start: {(root / 'start.log').read_text()[-500:]!r}")
            time.sleep(0.1)
        try:
            cluster._try_a_job(nodes)
        except subprocess.SubprocessError as error:
            cluster.stop()
            raise Unavailable(f"it takes no job: {error}") from error
        return cluster

    def _try_a_job(self, nodes: int) -> None:
        """Raises Unavailable unless a job on all nodes runs a step: daemons may answer where no job can start."""
        sign, log = self.root / "tried", self.root / "tried.log"
        words = f"srun --input=none hostname && touch {sign}"
        self.run("sbatch", f"--nodes={nodes}", f"--output={log}", "--wrap", words)
        end = time.monotonic() + START_S
        while not sign.exists():
            if time.monotonic() > end:
                said = log.read_text()[-500:] if log.exists() else self.run("squeue", "--format=%T %r")
                self.stop()
                raise Unavailable(f"a job on all nodes did not run: {said!r}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process of the cluster, the jobs' included."""
        for pid in self._inside():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # the namespace's first process takes all others with it
        self.process.kill()
        self.process.wait()

    def run(self, *words: str) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    def kill_node(self, name: str, *, only_slurmd: bool = False) -> None:
        """SIGKILL to a node's slurmd and, unless told otherwise, to every step and process on the node."""
        daemon = next(pid for pid in _pids() if _command(pid)[:3] == ["slurmd", "-N", name] and self._is_ours(pid))
        node = os.readlink(f"/proc/{daemon}/ns/uts")
        for pid in [daemon] if only_slurmd else [pid for pid in _pids() if _namespace(pid) == node]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a killed node's slurmd again and wait until the node is idle."""
        enter = ["nsenter", "--target", str(self._inside()[0]), "--mount", "--pid", "unshare", "--uts", "sh", "-c"]
        env = {**os.environ, **self.environment, "PATH": os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"}
        subprocess.run([*enter, f"hostname {name}; exec slurmd -N {name}"], env=env, check=True, timeout=60)
        end = time.monotonic() + START_S
        while self.run("sinfo", "--noheader", "--nodes", name, "--partition", "main", "--format=%T") != "idle":
            assert time.monotonic() < end, f"node {name} did not come back"
            time.sleep(0.2)

    def _inside(self) -> list[int]:
        """The first process of the namespaces, while there is one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in children.read_text().split()] if children.exists() else []

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _command(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return [os.path.basename(words[0]), *words[1:]]
    return []


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/uts")
    return ""


def _free_ports(nodes: int) -> int:
    """The first of nodes + 1 ports that nobody listens on."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + nodes + 1):
                probe = probes.enter_context(socket.socket())
                probe.bind(("0.0.0.0", port))
            return first
