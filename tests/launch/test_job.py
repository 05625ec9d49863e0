"""Jobs and outcomes as values: complete, canonical, refusing what they don't know."""

import json
from pathlib import Path

import pytest

from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources, canonical_json

JOB = Job(
    "4f2a",
    ("/bin/true", "ä"),
    Path("/runs/4f2a"),
    60.0,
    "result.json",
    {"OMP_NUM_THREADS": "1"},
    Resources(cores=2, memory_bytes=1 << 30),
)
OUTCOME = JobOutcome(
    "4f2a", OutcomeKind.CRASHED, 3, None, 1.5, 0.7, 4096, "n1", 2, "2026-01-02T03:04:05.000+00:00", "why"
)


@pytest.mark.parametrize("value", [JOB, OUTCOME])
def test_json_and_back_is_the_identity(value: Job | JobOutcome) -> None:
    text = canonical_json(value.to_json())
    again = type(value).from_json(json.loads(text))
    assert again == value
    assert canonical_json(again.to_json()) == text


@pytest.mark.parametrize("value", [JOB, OUTCOME])
def test_unknown_and_missing_keys_are_refused(value: Job | JobOutcome) -> None:
    document = value.to_json()
    with pytest.raises(ValueError, match=r"unknown \['colour'\]"):
        type(value).from_json(document | {"colour": "red"})
    del document["key"]
    with pytest.raises(ValueError, match=r"missing \['key'\]"):
        type(value).from_json(document)
    with pytest.raises(ValueError, match="JSON object"):
        type(value).from_json([])


def test_what_an_earlier_version_wrote_is_read() -> None:
    document = JOB.to_json()
    del document["resources"]["tasks"], document["stall_s"], document["start_s"]
    assert Job.from_json(document) == JOB
    document = OUTCOME.to_json()
    del document["max_gpu_bytes"]
    assert JobOutcome.from_json(document) == OUTCOME


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="fine"):
        JobOutcome.from_json(OUTCOME.to_json() | {"kind": "fine"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": ""}, "key"),
        ({"argv": []}, "argv"),
        ({"stall_s": 0.0}, "stall_s must be positive; got 0.0: leave it None"),
        ({"argv": ["sleep", 1]}, "str"),
        ({"run_dir": "runs/1"}, "absolute"),
        ({"done_file": "a/b"}, "plain name"),
        ({"time_limit_s": 0}, "positive"),
        ({"time_limit_s": float("inf")}, "positive"),
        ({"resources": {"cores": 0, "gpus": 0, "memory_bytes": None}}, "cores"),
        ({"resources": {"cores": 1, "gpus": 0, "memory_bytes": 0}}, "memory_bytes"),
        ({"resources": {"cores": 1, "gpus": 0, "memory_bytes": None, "tasks": 0}}, "tasks"),
        ({"resources": []}, "Resources must be a JSON object"),
    ],
)
def test_a_job_that_cannot_be_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Job.from_json(JOB.to_json() | change)


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        JOB.env["OMP_NUM_THREADS"] = "2"
