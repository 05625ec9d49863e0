"""The Slurm launcher: submits jobs, follows them through one squeue for all, and reads how they ended in their folders.

    submit --> attempts/N/job.json, submission.json (an intent, then the job's id) --> sbatch
    poll   --> attempts/N/outcome.json, which the job's supervisor writes; else the queue's word

Everything it must remember is in the run folders. A reply that got lost is found again by the submission's name, which
no other has, before anything is submitted once more; a second job that slips through nevertheless finds the attempt
claimed and ends at once (`slurm_batch`). Slurm is asked a few times a minute, however often `poll` is called.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megatron_evolve.launch import rundir, slurm_queue
from megatron_evolve.launch.ending import read_tail
from megatron_evolve.launch.fence import GAVE_UP, shut_out
from megatron_evolve.launch.job import Job, JobOutcome, JobState, OutcomeKind, is_new_attempt
from megatron_evolve.launch.slurm import Queue, Script, inside, minutes, name_of, render, render_array, shape
from megatron_evolve.launch.slurm_batch import OWNER_FILE
from megatron_evolve.launch.slurm_queue import Row, SlurmError, SlurmSilent
from megatron_evolve.launch.starts import charged

SUBMISSION_FILE = "submission.json"
ARRAYS_FOLDER = "slurm-arrays"
ARRAY_MOST = 1000  # tasks; Slurm's own limit, MaxArraySize, is 1001 unless a site says otherwise

_RUNS = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_HELD = {"SPECIAL_EXIT", "REQUEUE_HOLD"}
# How an attempt ended that wrote no outcome itself. CANCELLED and TIMEOUT have further rules of their own.
_ENDS: dict[str, tuple[OutcomeKind, str]] = {
    "COMPLETED": (OutcomeKind.LOST, "its batch script ended without an outcome"),
    "FAILED": (OutcomeKind.LOST, "its batch script failed without an outcome"),
    "CANCELLED": (OutcomeKind.LOST, "was cancelled in Slurm, not by us"),
    "TIMEOUT": (OutcomeKind.TIMED_OUT, "ran to the end of its allocation"),
    "DEADLINE": (OutcomeKind.LOST, "could not end before its deadline"),
    "OUT_OF_MEMORY": (OutcomeKind.OUT_OF_MEMORY, "Slurm ended it for its memory"),
    "NODE_FAIL": (OutcomeKind.LOST, "its node failed, and Slurm did not put it back"),
    "BOOT_FAIL": (OutcomeKind.LOST, "its node did not boot"),
    "PREEMPTED": (OutcomeKind.LOST, "was preempted, and Slurm did not put it back"),
    "REVOKED": (OutcomeKind.LOST, "was taken back by Slurm's federation"),
}


@dataclass(frozen=True)
class Submission:
    """What was handed to sbatch. `job` is None until its reply is known: an intent."""

    name: str
    index: int | None
    job: str | None


@dataclass(eq=False)
class _Entry:
    """One submitted job and what is known of its latest attempt."""

    job: Job
    attempt: int
    state: JobState = "pending"
    submission: Submission | None = None
    cancelled: bool = False
    scancelled_at: float = float("-inf")
    gone_since: float | None = None  # when the queue first called it ended, or did not know it
    told: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return rundir.attempt_dir(self.job.run_dir, self.attempt)

    @property
    def is_submitted(self) -> bool:
        return self.submission is not None and self.submission.job is not None


class SlurmLauncher:
    """A Launcher for a Slurm cluster, whose nodes see the run folders under the same paths.

    queue            where the cluster takes jobs
    state_dir        the campaign's folder, for the lists of arrays
    queue_every_s    least time between two squeue
    folders_every_s  least time between two looks into the run folders
    settle_s         how long an outcome may take to show on a network file system after Slurm calls a job ended
    retry_s          how long to wait before a silent Slurm is asked to take a job again
    """

    def __init__(
        self,
        queue: Queue,
        state_dir: Path,
        *,
        queue_every_s: float = 15.0,
        folders_every_s: float = 1.0,
        settle_s: float = 60.0,
        retry_s: float = 15.0,
    ) -> None:
        self._queue, self._state_dir = queue, Path(state_dir)
        self._queue_every_s, self._folders_every_s = queue_every_s, folders_every_s
        self._settle_s, self._retry_s = settle_s, retry_s
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, _Entry] = {}
        self._queue_due = self._folders_due = self._submit_due = 0.0
        self._silence = ""

    def render(self, job: Job) -> str:
        return render(inside(job, self._queue), self._queue).text

    def submit(self, job: Job, attempt: int = 1) -> None:
        """See `Launcher.submit`; sbatch is called by the next `poll`, for all jobs together.

        Raises ValueError for a job that does not fit the cluster, RunDirError for a bad folder.
        """
        job = inside(job, self._queue)
        render(job, self._queue, attempt)
        entry = self._entries.get(job.key) or self._adopted(job)
        if is_new_attempt(job, attempt, entry):
            rundir.prepare_attempt(job, attempt)
            entry = _Entry(job, attempt)
        self._file(entry)

    def poll(self, keys: Iterable[str]) -> dict[str, JobState]:
        """See `Launcher.poll`; also submits what is new. Raises SlurmError where Slurm refuses a job, RunDirError."""
        now = time.monotonic()
        if now >= self._folders_due:
            self._folders_due = now + self._folders_every_s
            for entry in list(self._open.values()):
                self._read_outcome(entry)
        try:
            if now >= self._submit_due:
                self._submit_open()
            if now >= self._queue_due and any(entry.is_submitted for entry in self._open.values()):
                self._queue_due = now + self._queue_every_s
                self._follow(slurm_queue.queue(), now)
            self._tell_silence("")
        except SlurmSilent as silence:
            self._submit_due = now + self._retry_s
            self._tell_silence(f"Slurm does not answer: {silence}; jobs go on, asking again")
        return {key: self._known(key).state for key in keys}

    def cancel(self, key: str) -> None:
        """See `Launcher.cancel`."""
        entry = self._known(key)
        if isinstance(entry.state, JobOutcome):
            return
        if not entry.cancelled:
            rundir.write_whole(entry.folder / rundir.CANCEL_FILE, "")
            entry.cancelled = True
        if entry.submission is None:
            self._end(entry, OutcomeKind.CANCELLED, "was cancelled before it was submitted")
        elif entry.is_submitted:
            self._scancel(entry, time.monotonic())

    def close(self) -> None:
        """Nothing to end: jobs go on under Slurm."""

    def __enter__(self) -> "SlurmLauncher":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- what is known ------------------------------------------------------------------------------------------------

    def _known(self, key: str) -> _Entry:
        if key not in self._entries:
            raise ValueError(f"expected the key of a submitted job; got {key}: submit it first")
        return self._entries[key]

    def _file(self, entry: _Entry) -> None:
        self._entries[entry.job.key] = entry
        if isinstance(entry.state, JobOutcome):
            self._open.pop(entry.job.key, None)
        else:
            self._open[entry.job.key] = entry

    def _adopted(self, job: Job) -> _Entry | None:
        """What the job's run folder holds of it, None if it was never tried. Raises ValueError if it is another's."""
        latest = rundir.latest_attempt(job.run_dir)
        if latest == 0:
            return None
        entry = _Entry(job, latest)
        asked = rundir.read_job(entry.folder)
        if asked.key != job.key:
            raise ValueError(
                f"run folder {job.run_dir} must belong to job {job.key}; it belongs to {asked.key}: choose another"
            )
        entry.cancelled = (entry.folder / rundir.CANCEL_FILE).exists()
        if (entry.folder / SUBMISSION_FILE).exists():
            entry.submission = Submission(**rundir.read_json(entry.folder / SUBMISSION_FILE))
        begun = rundir.read_supervisor(entry.folder) is not None
        entry.state = "running" if begun else "pending"  # until the queue is asked
        if self._read_outcome(entry) or entry.submission is not None:
            return entry
        if begun:  # but not by Slurm
            with rundir.Lock(job.run_dir / rundir.LOCK_FILE):  # raises LockHeld, which names who runs it
                self._end(entry, OutcomeKind.LOST, "was begun by another launcher, which is gone")
        return entry

    def _read_outcome(self, entry: _Entry) -> bool:
        """Whether the attempt has ended, by its own word."""
        outcome, damage = rundir.take_outcome(entry.folder)
        if damage:
            print(f"{entry.job.key}: {damage}", file=sys.stderr)
        if outcome is not None:
            entry.state = outcome
            self._file(entry)
        return outcome is not None

    # --- submitting ---------------------------------------------------------------------------------------------------

    def _submit_open(self) -> None:
        """Hand to Slurm what it does not have. Raises SlurmSilent, leaving intents; SlurmError, leaving none."""
        if unanswered := [one for one in self._open.values() if one.submission is not None and not one.is_submitted]:
            self._find_again(unanswered)
        new = [entry for entry in self._open.values() if entry.submission is None]
        for group in self._groups(new):
            script, path = self._intend(group)
            try:
                job = slurm_queue.submit(path)
            except SlurmError:
                for entry in group:
                    (entry.folder / SUBMISSION_FILE).unlink()
                    entry.submission = None
                raise
            for entry in group:
                index = entry.submission.index
                self._note(entry, Submission(script.name, index, job if index is None else f"{job}_{index}"))

    def _groups(self, entries: Sequence[_Entry]) -> list[list[_Entry]]:
        """One job each; with a throttle, jobs of one shape together."""
        if self._queue.throttle is None:
            return [[entry] for entry in entries]
        groups: dict[object, list[_Entry]] = {}
        for entry in entries:
            groups.setdefault(shape(entry.job), []).append(entry)
        return [list(part) for group in groups.values() for part in itertools.batched(group, ARRAY_MOST)]

    def _intend(self, group: Sequence[_Entry]) -> tuple[Script, Path]:
        """Write the script and, with each attempt, the name under which it will be submitted."""
        first = group[0]
        if len(group) == 1:
            script = render(first.job, self._queue, first.attempt)
            path = first.folder / "script.sbatch"
        else:
            folders = [entry.folder for entry in group]
            name = name_of(folders, f"{self._state_dir.name}-array")
            attempts = self._state_dir / ARRAYS_FOLDER / f"{name}.attempts"
            rundir.make_folder(attempts.parent)
            rundir.write_whole(attempts, "".join(f"{folder}\n" for folder in folders))
            script = render_array([entry.job for entry in group], self._queue, attempts, name)
            path = attempts.with_suffix(".sbatch")
        rundir.write_whole(path, script.text)
        for number, entry in enumerate(group):
            self._note(entry, Submission(script.name, number if len(group) > 1 else None, None))
        return script, path

    def _find_again(self, entries: Sequence[_Entry]) -> None:
        """Look up submissions whose reply is not known. One that nobody has heard of is as if never made."""
        rows = slurm_queue.queue()
        for entry in entries:
            mine = [row for row in rows if row.name == entry.submission.name and row.task == entry.submission.index]
            owner = entry.folder / OWNER_FILE
            if owner.exists() or mine:
                job = owner.read_text() if owner.exists() else mine[0].id
                self._note(entry, Submission(entry.submission.name, entry.submission.index, job))
            elif entry.cancelled:
                self._end(entry, OutcomeKind.CANCELLED, "was cancelled before it was submitted")
            else:
                entry.submission = None

    def _note(self, entry: _Entry, submission: Submission) -> None:
        rundir.write_json(entry.folder / SUBMISSION_FILE, asdict(submission))
        entry.submission = submission

    # --- following ----------------------------------------------------------------------------------------------------

    def _follow(self, rows: Sequence[Row], now: float) -> None:
        """Bring every submitted entry's state up to what the queue says."""
        by_id = {row.id: row for row in rows} | {row.number: row for row in rows}
        for entry in list(self._open.values()):
            if entry.is_submitted:
                self._follow_one(entry, by_id.get(entry.submission.job), now)

    def _follow_one(self, entry: _Entry, row: Row | None, now: float) -> None:
        if row is not None:
            self._show(entry, row)
        if row is None or row.state in _ENDS:
            self._gone(entry, row, now)
        elif row.state in _HELD or row.reason == "launch failed requeued held":
            self._scancel(entry, now)
            self._end(entry, OutcomeKind.LOST, f"Slurm could not start it and holds it ({row.reason or row.state})")
        else:
            entry.gone_since = None
            entry.state = "running" if row.state in _RUNS else "pending"
            if entry.cancelled:
                self._scancel(entry, now)

    def _gone(self, entry: _Entry, row: Row | None, now: float) -> None:
        """Slurm calls it ended or forgot it: wait for its outcome to show, then say how it ended."""
        entry.gone_since = now if entry.gone_since is None else entry.gone_since
        if self._read_outcome(entry):
            return
        owner = entry.folder / OWNER_FILE
        if owner.exists() and row is not None and owner.read_text() not in (row.number, row.id):
            # A second job that ended at once; the attempt is another's, whose reply was lost.
            self._note(entry, Submission(entry.submission.name, None, owner.read_text()))
            entry.gone_since = None
            return
        never_began = row is not None and entry.cancelled and not owner.exists()
        if now - entry.gone_since < self._settle_s and not never_began:
            return
        job = entry.submission.job
        if row is None:
            kind, reason = OutcomeKind.LOST, "Slurm no longer knows it, and it left no outcome"
        else:
            kind, reason = _ENDS[row.state]
            if row.state == "TIMEOUT" and minutes(entry.job, self._queue) * 60 < entry.job.time_limit_s:
                kind = OutcomeKind.LOST  # its own time is not over: the next attempt goes on
        if entry.cancelled:
            kind, reason = OutcomeKind.CANCELLED, "was cancelled"
        self._end(entry, kind, f"{reason} (Slurm job {job}{_last_words(entry.folder)})")

    def _scancel(self, entry: _Entry, now: float) -> None:
        if now - entry.scancelled_at >= self._queue_every_s:
            with contextlib.suppress(SlurmSilent, SlurmError):  # the next look at the queue asks again or says why
                slurm_queue.cancel([entry.submission.job])
            entry.scancelled_at = now
            self._queue_due = min(self._queue_due, now + 1.0)

    def _end(self, entry: _Entry, kind: OutcomeKind, reason: str) -> None:
        """Record the end of an attempt whose own supervisor did not, and shut out whatever still runs of it."""
        run_dir, attempt = entry.job.run_dir, entry.attempt
        shut_out(run_dir, attempt, GAVE_UP)
        if self._read_outcome(entry):
            return
        outcome = JobOutcome.unmeasured(entry.job.key, attempt, kind, os.uname().nodename, reason)
        rundir.write_outcome(run_dir, charged(entry.folder, outcome))
        shut_out(run_dir, attempt, GAVE_UP)
        self._read_outcome(entry)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _show(self, entry: _Entry, row: Row) -> None:
        """Keep what the queue says beside the attempt; tell a person who alone can help."""
        seen = (row.state, row.nodes, row.reason)
        if seen == entry.told:
            return
        if row.reason.startswith("JobHeld"):
            print(f"{entry.job.key} is held ({row.reason}): `scontrol release {row.id}` lets it start", file=sys.stderr)
        entry.told = seen
        reason = "" if row.reason == "None" else row.reason
        rundir.write_queued(entry.folder, rundir.Queued(row.id, row.state, row.nodes, reason))

    def _tell_silence(self, text: str) -> None:
        if text != self._silence:
            print(text or "Slurm answers again", file=sys.stderr)
        self._silence = text


def _last_words(folder: Path) -> str:
    """What an attempt's batch script said last, if anything."""
    for name in ("slurm.log", rundir.SUPERVISOR_LOG):
        path = folder / name
        lines = [line for line in read_tail(path).splitlines() if line.strip()] if path.exists() else []
        if lines:
            return f", whose last words were {lines[-1].strip()[:200]!r}"
    return ""
