"""The files of a campaign folder: where each value comes to rest, and its digest for the ledger.

Values are JSON (or YAML where people edit them), written whole. `save` returns the digest that the ledger keeps; `load`
checks it, so a file changed behind the ledger's back is found when it is next read.
"""

from pathlib import Path
from typing import Any

from megatron_evolve.document import read_text
from megatron_evolve.launch.rundir import make_folder, read_json, write_json, write_whole
from megatron_evolve.substrate.digest import digest_file, digest_of
from megatron_evolve.yaml_blocks import text_of, value_in


class CampaignFolder:
    """Paths within a campaign folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    campaign = property(lambda self: self.root / "campaign.yaml")
    constitution = property(lambda self: self.root / "constitution.yaml")
    site = property(lambda self: self.root / "site.yaml")  # where it ran last, unless on this machine's cores
    ledger = property(lambda self: self.root / "ledger.jsonl")
    looks = property(lambda self: self.root / "looks.jsonl")
    lock = property(lambda self: self.root / "controller.lock")
    stop_file = property(lambda self: self.root / "stop")
    report = property(lambda self: self.root / "report.html")
    closing = property(lambda self: self.root / "closing")
    pruned = property(lambda self: self.root / "pruned.jsonl")  # what was removed to free its space
    open_final = property(lambda self: self.root / "external" / "open-final.json")  # an operator's word

    def round(self, number: int) -> Path:
        """Folder of a round."""
        return self.root / "rounds" / str(number)

    def policy(self, number: int) -> Path:
        """The policy that round `number` searches under."""
        return self.round(number) / "policy.yaml"

    def edits(self, number: int) -> Path:
        """The edits that made round `number`'s policy."""
        return self.round(number) / "edits.json"

    def evidence(self, number: int) -> Path:
        """What round `number` found."""
        return self.round(number) / "evidence.json"

    def worker(self, number: int, worker: int) -> Path:
        """A worker's briefs and proposals."""
        return self.round(number) / "workers" / str(worker)

    def candidate(self, number: int, name: str) -> Path:
        """A candidate of a round."""
        return self.round(number) / name

    def submitted(self, key: str) -> Path:
        """The score that an operator brought for a run (round/candidate/seed)."""
        return self.root / "external" / f"{key.replace('/', '-')}.json"

    def run(self, number: int, name: str, seed: int) -> Path:
        """One run of a candidate."""
        return self.candidate(number, name) / "runs" / str(seed)


def save_json(path: Path, value: Any) -> str:
    """Writes a value as JSON and returns its digest."""
    plain = value.model_dump(mode="json", by_alias=True) if hasattr(value, "model_dump") else value
    make_folder(path.parent)
    write_json(path, plain)
    return digest_of(plain)


def save_yaml(path: Path, value: Any) -> str:
    """Writes a value as YAML, for people, and returns the digest of its canonical form."""
    plain = value.model_dump(mode="json", by_alias=True) if hasattr(value, "model_dump") else value
    make_folder(path.parent)
    write_whole(path, text_of(plain))
    return digest_of(plain)


def load_json(path: Path, digest: str) -> Any:
    """The value in a file, refused unless its digest is the one the ledger keeps."""
    value = read_json(path)
    check_digest(path, value, digest)
    return value


def load_yaml_checked(path: Path, digest: str) -> dict[str, Any]:
    """Like `load_json`, for YAML."""
    value = value_in(read_text(path), where=str(path))
    check_digest(path, value, digest)
    return value


def check_file(path: Path, digest: str) -> None:
    """Raises ValueError when a file's bytes are not those that the ledger says a job left there."""
    found = digest_file(path) if path.exists() else None
    if found != digest:
        got = "no file" if found is None else found[:12]
        raise ValueError(
            f"{path} is not what was left there: expected digest {digest[:12]}, got {got}; restore the file"
        )


def check_digest(path: Path, value: Any, digest: str) -> None:
    """Raises ValueError when `value` is not what the ledger says was written to `path`."""
    found = digest_of(value)
    if found != digest:
        raise ValueError(
            f"{path} is not what the ledger recorded: expected digest {digest[:12]}, got {found[:12]}; restore the file"
        )
