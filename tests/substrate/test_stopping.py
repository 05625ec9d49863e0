"""A run told to stop saves and goes on bit for bit; a copy that a later start has overtaken writes nothing more.

In one process; `tests/slurm` does the same with four ranks on two nodes.
"""

import os
import signal
from pathlib import Path

import pytest

from megatron_evolve.launch.fence import Token, fence_environment, raise_fence
from megatron_evolve.substrate.train import run
from megatron_evolve.substrate.train.record import Record
from tests.substrate.test_checkpoint import arguments, digests, substrate  # noqa: F401 -- a fixture


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act) -> None:
    """Have `act` happen while step `number` is recorded."""
    add = Record.add

    def recording(self: Record, seconds: float, **entry) -> None:
        add(self, seconds, **entry)
        if entry["step"] == number:
            act()

    monkeypatch.setattr(Record, "add", recording)


def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(substrate, tmp_path, monkeypatch, capsys):  # noqa: F811
    before = signal.getsignal(signal.SIGTERM)
    assert run.main(arguments(substrate, tmp_path, "whole", save_every=0)) == 0
    argv = arguments(substrate, tmp_path, "stopped", save_every=0)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run.main(argv) == 75
    assert "stopped as asked and saved after step 3" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "stopped" / "resume").iterdir()] == ["step-000000003"]
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert run.main(argv) == 0
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_told_to_stop_in_its_last_step_a_run_finishes(substrate, tmp_path, monkeypatch):  # noqa: F811
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run.main(arguments(substrate, tmp_path)) == 0


def test_an_overtaken_copy_writes_no_checkpoint_and_no_result(substrate, tmp_path, monkeypatch, capsys):  # noqa: F811
    argv, out = arguments(substrate, tmp_path, save_every=2), tmp_path / "run"
    out.mkdir()
    mine = Token(attempt=1, start=0, holder="17")
    raise_fence(out, mine)
    for name, value in fence_environment(out, mine).items():
        monkeypatch.setenv(name, value)
    at_step(monkeypatch, 4, lambda: raise_fence(out, Token(attempt=1, start=1, holder="17")))
    assert run.main(argv) == 1
    assert "start 1 of attempt 1 by 17 has it: this copy writes no more" in capsys.readouterr().err
    assert [path.name for path in (out / "resume").iterdir()] == ["step-000000004"]
    assert not (out / "result.json").exists() and not (Path(out) / "checkpoint").exists()
