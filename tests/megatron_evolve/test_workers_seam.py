"""The process seam: what goes through it, what does not, and how each call ends."""

import json
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from megatron_evolve.constitution import Constitution
from megatron_evolve.ledger import History, Ledger
from megatron_evolve.meta import initial_policy
from megatron_evolve.policy import Axis, DomainState
from megatron_evolve.substrate.digest import digest_bytes
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.workers.brief import Brief, delta_document, document
from megatron_evolve.workers.propose import propose
from megatron_evolve.workers.seam import call_worker

DEFAULT = (sys.executable, "-m", "megatron_evolve.workers.propose")
RULES = Constitution()


@pytest.fixture
def brief() -> Brief:
    standing = Settings(mix=Mix(weight={"a": 1, "b": 1}, style={"a": "answer", "b": "answer"}), recipe=Recipe())
    domains = {name: DomainState(dev=0.5, external=None, dev_weight=0.5, external_weight=None) for name in "ab"}
    view = {
        "digest": "a" * 64,
        "default": standing.model_dump(mode="json"),
        "construction": {"families": ["a", "b"], "styles": {"a": ["answer"], "b": ["answer"]}},
    }
    return Brief(
        verb="propose",
        substrate=view,
        policy=initial_policy(standing, domains, RULES),
        axis=Axis(name="lr", operator="lr"),
        seed=1,
        mutation_space=RULES.mutation_space,
        limits=RULES.limits,
    )


def program(folder: Path, text: str) -> tuple[str, ...]:
    path = folder / "program.py"
    path.write_text("import json, os, sys, time\nbrief, reply = sys.argv[1:]\n" + text)
    return (sys.executable, str(path))


def test_the_default_worker_answers_through_the_seam_as_in_process(brief: Brief, tmp_path: Path) -> None:
    call, proposal = call_worker(DEFAULT, brief, tmp_path / "desk", time_limit_s=60)
    assert (call.ending, call.reason, call.program) == ("ok", "", DEFAULT)
    assert proposal == propose(brief)
    assert call.prompt == brief.digest
    assert call.reply == digest_bytes((tmp_path / "desk" / "proposal.json").read_bytes())
    kept = Brief.parse(json.loads((tmp_path / "desk" / "brief.json").read_bytes()), where="brief")
    assert kept == brief
    assert call.refused("No.").ending == "refused"


def test_a_brief_survives_its_file_and_names_its_content(brief: Brief) -> None:
    again = Brief.parse(json.loads(json.dumps(document(brief))), where="brief")
    assert (again, again.digest) == (brief, brief.digest)
    assert brief.replace(seed=2).digest != brief.digest
    with pytest.raises(ValueError, match="reason"):
        Brief.parse({**document(brief), "verb": "repair"}, where="brief")


def test_nothing_of_the_environment_and_no_other_folder_goes_through(
    brief: Brief, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXTERNAL_CSV", "/secret/target.csv")
    monkeypatch.setenv("MODEL_KEY", "key")
    seen = program(
        tmp_path,
        "told = {'env': dict(os.environ), 'cwd': os.getcwd(), 'files': os.listdir('.'), 'stdin': sys.stdin.read(),\n"
        "        'brief': brief, 'fds': len(os.listdir('/proc/self/fd'))}\n"
        "open(reply, 'w').write(json.dumps(told))",
    )
    call, proposal = call_worker(seen, brief, tmp_path / "desk", time_limit_s=60, keep_env=("MODEL_KEY",))
    assert (call.ending, proposal) == ("malformed", None)
    told = json.loads((tmp_path / "desk" / "proposal.json").read_text())
    allowed = {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "HOME", "TMPDIR", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
    assert set(told["env"]) <= {*allowed, "MODEL_KEY"}
    assert told["env"]["MODEL_KEY"] == "key"
    assert "secret" not in json.dumps(told)
    assert str(tmp_path) not in json.dumps(told), "the campaign's folder is not named"
    assert sorted(told["files"]) == ["brief.json", "stderr.txt"]
    assert told["stdin"] == ""
    assert not Path(told["cwd"]).exists(), "the private folder is gone"


def test_a_program_out_of_time_is_stopped_with_all_its_children(brief: Brief, tmp_path: Path) -> None:
    mark = tmp_path / "child"
    slow = program(
        tmp_path,
        f"child = os.fork()\nif child: open({str(mark)!r}, 'w').write(str(child))\ntime.sleep(60)",
    )
    started = time.monotonic()
    call, proposal = call_worker(slow, brief, tmp_path / "desk", time_limit_s=1.5)
    assert (call.ending, proposal, call.reply) == ("timed_out", None, "")
    assert time.monotonic() - started < 20
    assert gone(int(mark.read_text()))


def test_a_child_left_behind_is_ended_with_its_parent(brief: Brief, tmp_path: Path) -> None:
    mark = tmp_path / "child"
    leaving = program(
        tmp_path,
        f"child = os.fork()\nif not child: time.sleep(60)\nopen({str(mark)!r}, 'w').write(str(child))",
    )
    call_worker(leaving, brief, tmp_path / "desk", time_limit_s=30)
    assert gone(int(mark.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended within a few seconds; a zombie whose parent has gone counts as ended."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pass", "no file"),
        ("open(reply, 'w').write('not json')", "expected a proposal"),
        ("open(reply, 'w').write('[]')", "expected a proposal"),
        ('open(reply, \'w\').write(\'{"brief": "x", "nothing": ""}\')', "either a delta or"),
        ('open(reply, \'w\').write(\'{"brief": "x", "nothing": "tired"}\')', "answers brief 'x'"),
        ("open(reply, 'w').write('[' * 100000)", "expected a proposal"),
        ("open(reply, 'wb').write(b'\\xff' * 2000000)", "at most"),
        ("os.symlink('/etc/hostname', reply)", "no file"),
        ("sys.exit('it broke')", "status 1: it broke"),
    ],
)
def test_malformed_answers_say_what_was_wrong(brief: Brief, tmp_path: Path, text: str, said: str) -> None:
    call, proposal = call_worker(program(tmp_path, text), brief, tmp_path / "desk", time_limit_s=30)
    assert (call.ending, proposal) == ("malformed", None)
    assert said in call.reason


@pytest.mark.parametrize("value", [r'"\ud800"', r'{"\ud800": 1}', "[" * 400 + "]" * 400, "[" * 253 + "]" * 253])
@pytest.mark.parametrize("place", ["change", "sampling"])
def test_what_no_ledger_can_keep_is_malformed_and_the_ledger_is_not_asked(
    brief: Brief, tmp_path: Path, value: str, place: str
) -> None:
    """Legal JSON, all of it. A reply is either refused here or an event that can be written and read again."""
    change = {"recipe.lr": {"set": "HERE" if place == "change" else 0.001}}
    told = {"brief": brief.digest, "delta": {"hypothesis": "h", "change": change}}
    told["usage"] = {"sampling": {"stop": "HERE"}} if place == "sampling" else None
    text = json.dumps(told).replace('"HERE"', value)
    call, proposal = call_worker(
        program(tmp_path, f"open(reply, 'w').write({text!r})"), brief, tmp_path / "desk", time_limit_s=30
    )
    event = {"delta": delta_document(proposal.delta if proposal else None), "call": call.model_dump(mode="json")}
    with closing(Ledger(tmp_path)) as ledger:
        ledger.append("proposed", "1/1/0", event)
    assert History(tmp_path / "ledger.jsonl").latest.data == event
    if "ud800" in value or len(value) == 800:
        assert call.ending == "malformed" and "expected a proposal, got" in call.reason and "\n" not in call.reason


def test_an_unavailable_program_is_told_and_nobody_answers_for_it(brief: Brief, tmp_path: Path) -> None:
    busy = program(tmp_path, "print('no capacity', file=sys.stderr); sys.exit(75)")
    for argv, said in ((busy, "no capacity"), (("/no/such/program",), "could not be started")):
        call, proposal = call_worker(argv, brief, tmp_path / "desk", time_limit_s=30)
        assert (call.ending, proposal) == ("unavailable", None)
        assert said in call.reason


def test_an_honest_nothing_and_its_usage_come_through(brief: Brief, tmp_path: Path) -> None:
    told = {"brief": brief.digest, "nothing": "Nothing to try.", "usage": {"model": "m", "tokens_in": 3, "cost": 0.1}}
    call, proposal = call_worker(
        program(tmp_path, f"open(reply, 'w').write({json.dumps(told)!r})"), brief, tmp_path / "desk", time_limit_s=30
    )
    assert call.ending == "ok"
    assert proposal is not None and proposal.nothing == "Nothing to try."
    assert call.usage is not None and call.usage.tokens_in == 3


def test_the_program_refuses_a_file_that_is_no_brief(brief: Brief, tmp_path: Path) -> None:
    from megatron_evolve.workers.propose import main

    (tmp_path / "brief.json").write_text("{}")
    assert main([str(tmp_path / "brief.json"), str(tmp_path / "proposal.json")]) == 2
    assert not (tmp_path / "proposal.json").exists()
    assert main([]) == 2
