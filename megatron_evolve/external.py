"""External scores from outside: an operator's hand or a program brings one number a run, and none is asked twice.

    look paid (looks.jsonl) -> awaited, or the program asked once (ledger) -> score submitted (external/, its digest in
    the ledger) -> recorded

A score is written once and never changed. A reply that was lost is a spent look and an unknown score; only an operator
may have the program ask again, by a command that the ledger keeps. With `reported` the campaign pauses where scores are
awaited, and the same `run` goes on once they were submitted.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder, check_file, save_json
from megatron_evolve.audit import open_record
from megatron_evolve.campaign import ExternalScores
from megatron_evolve.desk import ENDED, STOPPED, Awaiting, Desk, Stopped
from megatron_evolve.eval.hook import Lost, ask_hook, checked_score
from megatron_evolve.eval.looks import Looks
from megatron_evolve.facts import REPORTED_FILE
from megatron_evolve.jobs import Run, Stage, StageEnd
from megatron_evolve.launch.rundir import Lock, make_folder, read_json, write_json
from megatron_evolve.ledger import History, Ledger
from megatron_evolve.status import awaited
from megatron_evolve.substrate.digest import digest_file
from megatron_evolve.written import open_written

ROUNDING = 1e-9


def ask_scores(desk: Desk, target: ExternalScores, stages: Sequence[tuple[Run, Stage]]) -> None:
    """Records the score of every run whose look was paid. Raises Awaiting where an operator must bring some first."""
    missing = []
    for run, stage in stages:
        key = f"{run.key}/{stage}"
        if desk.ledger.find("ended", key) is not None:
            continue
        told = submitted(desk.ground.folder, desk.ledger, run.key)
        if told is None and target.kind == "command":
            told = _asked_once(desk, target, run)
        elif told is None:
            missing.append(key)
        if told is not None:
            _record(desk, target, run, stage, told)
        if desk.stop():
            raise Stopped(STOPPED)
    if missing:
        # The list only shrinks, so its first run and its length name it: a shorter one is a pause of its own.
        desk.ledger.once("external-awaited", f"{missing[0]}/{len(missing)}", lambda: {"runs": missing})
        raise Awaiting(
            f"{len(missing)} external score(s) are awaited: see `megatron-evolve external list "
            f"{desk.ground.folder.root}`, submit them, and run the same command to go on"
        )


def _asked_once(desk: Desk, target: ExternalScores, run: Run) -> dict[str, Any] | None:
    """The program's score of a run, or none if its reply is lost. The ledger has the question before it is put."""
    again = len([one for one in desk.ledger.of_kind("external-again") if one.data["run"] == run.key])
    asked = len([one for one in desk.ledger.of_kind("external-asked") if one.data["run"] == run.key])
    if asked > again:
        reason = "the controller ended before the reply came"
        desk.ledger.once("external-lost", f"{run.key}/{asked}", lambda: {"run": run.key, "reason": reason})
        return None
    number = asked + 1
    desk.ledger.append("external-asked", f"{run.key}/{number}", {"run": run.key, "argv": list(target.command)})
    reply = ask_hook(target.command, desk.ground.stage_dir(run, "train").resolve(), target.timeout_s)
    if not isinstance(reply, Lost):
        try:
            return {"score": checked(target, reply.score, reply.items), "by": "command"}
        except ValueError as error:
            reply = Lost("lost", str(error))
    lost = {"run": run.key, "ending": reply.ending, "reason": reply.reason}
    desk.ledger.append("external-lost", f"{run.key}/{number}", lost)
    return None


def _record(desk: Desk, target: ExternalScores, run: Run, stage: Stage, told: dict[str, Any]) -> None:
    """Puts a score where the reviewer reads it, its digest in the ledger."""
    score = checked(target, told["score"], None)
    path = desk.ground.stage_dir(run, stage) / REPORTED_FILE
    document = {"schema": "reported/1", "score": score, "items": target.items, "step": target.step, "by": told["by"]}

    end = StageEnd(run, stage, "finished", "", cpu_seconds=0.0, seconds=0.0, attempts=1)

    def ended() -> dict[str, Any]:
        save_json(path, document)
        facts = {name: getattr(end, name) for name in ENDED}
        return {"end": facts, "files": {REPORTED_FILE: digest_file(path)}}

    desk.ledger.once("ended", f"{run.key}/{stage}", ended)
    desk.on_progress("ended", {"round": run.round, "stage": stage, "end": end})


def checked(target: ExternalScores, score: Any, items: int | None, se: float | None = None) -> float:
    """A score as the target publishes it. Raises ValueError in one sentence where it cannot be the target's."""
    value = checked_score(score)
    if items is not None and items != target.items:
        raise ValueError(
            f"expected a score over {target.items} items, as the campaign declares, got one over {items}: it is "
            "another target's"
        )
    if target.step and abs(value / target.step - round(value / target.step)) > ROUNDING / target.step:
        raise ValueError(f"expected a score in steps of {target.step:g}, got {value}: enter it as it was published")
    most = (value * (1 - value) / target.items) ** 0.5
    if se is not None and not 0 <= se <= max(1.1 * most, 1 / target.items):
        raise ValueError(
            f"expected a standard error of at most {most:.4f} from {target.items} items, got {se}: the campaign "
            "declares more items than the score is worth; start one that declares fewer"
        )
    return value


# --- the operator's commands -----------------------------------------------------------------------------------------


def submitted(folder: CampaignFolder, history: History, key: str) -> dict[str, Any] | None:
    """The submitted score of a run, if there is one. Raises ValueError where it was changed since it was submitted."""
    path, event = folder.submitted(key), history.find("external-submitted", key)
    if event is not None:
        check_file(path, event.data["digest"])
    return read_json(path) if path.exists() else None


def listed(root: Path) -> list[dict[str, Any]]:
    """Every run whose external look was paid: awaited, submitted, scored, lost, or asked and not yet heard of."""
    folder, record = CampaignFolder(root), open_record(root)
    _target(record.campaign.judge.told_scores, root)
    waiting, lost = set(awaited(record.events)), _lost(record.events)
    return [_standing(folder, record.events, key, waiting, lost) for key in _paid(record.looks)]


def _paid(looks: Looks) -> list[str]:
    return [key for look in looks.entries if look.split.startswith("external") for key in look.runs]


def _standing(folder: CampaignFolder, history: History, key: str, waiting: set[str], lost: set[str]) -> dict[str, Any]:
    number, name, seed = key.split("/")
    told = submitted(folder, history, key)
    state, score = "asked", None
    if told is not None:
        state, score = "submitted", told["score"]
    elif waiting & {f"{key}/external-a", f"{key}/external-b"}:
        state = "awaited"
    elif key in lost:
        state = "lost"
    for stage in ("external-a", "external-b"):
        if (ended := history.find("ended", f"{key}/{stage}")) is not None:
            path = folder.run(int(number), name, int(seed)) / stage / REPORTED_FILE
            check_file(path, ended.data["files"][REPORTED_FILE])
            state, score = "scored", read_json(path)["score"]
    weights = str(folder.run(int(number), name, int(seed)) / "train")
    return {"run": key, "candidate": name, "seed": int(seed), "state": state, "score": score, "weights": weights}


def _lost(history: History) -> set[str]:
    """Runs that were lost oftener than they were asked again."""
    lost, again = (
        Counter(event.data["run"] for event in history.of_kind(kind)) for kind in ("external-lost", "external-again")
    )
    return set(lost - again)


def submit(root: Path, who: str, score: float, items: int | None = None, se: float | None = None) -> dict[str, Any]:
    """Keeps the score that an operator brings for a run, once. Raises ValueError where it is not asked or was told."""
    folder, record = CampaignFolder(root), open_record(root)
    target = _target(record.campaign.judge.told_scores, root)
    known = [one for one in listed(root) if who in (one["candidate"], f"{one['candidate']}/{one['seed']}", one["run"])]
    if not known:
        raise ValueError(f"expected a run whose look was paid, got {who!r}: see `megatron-evolve external list {root}`")
    unheard = [one for one in known if one["score"] is None] or known
    if len(unheard) > 1:
        names = ", ".join(one["run"] for one in unheard)
        raise ValueError(f"expected one run, {who} has {len(unheard)}: name one of {names}")
    (one,) = unheard
    value = checked(target, score, items, se)
    if one["state"] != "scored":
        keep_score(folder, one["run"], {"score": value, "items": target.items, "se": se, "by": "operator"})
        one = _standing(folder, History(folder.ledger), one["run"], waiting=set(), lost=set())  # told: neither any more
    if abs(one["score"] - value) > ROUNDING:
        raise ValueError(
            f"run {one['run']} was scored {one['score']}, got {value}: a score is never changed after the fact; judge "
            "with what is there"
        )
    return one


def keep_score(folder: CampaignFolder, key: str, document: dict[str, Any]) -> None:
    """Keeps a score and enters its digest: changed afterwards it is refused, also before the controller records it.

    Raises ValueError where the run's round is judged already.
    """
    with Lock(folder.lock):
        ledger = Ledger(folder.root)
        try:
            _check_unjudged(ledger, key)
            _write_once(folder.submitted(key), document)
            ledger.once("external-submitted", key, lambda: {"digest": digest_file(folder.submitted(key))})
        finally:
            ledger.close()


def _check_unjudged(history: History, key: str) -> None:
    """Raises ValueError where the round of a run is judged: a score that came now would be read by nobody."""
    number = key.split("/")[0]
    if history.has("evidence", number):
        raise ValueError(
            f"round {number} is judged without the score of {key}, and no round is judged twice: judge with what is "
            "there"
        )


def _write_once(path: Path, document: dict[str, Any]) -> None:
    """Writes a file whole unless it is there: of two operators the first is heard, and the second told so."""
    make_folder(path.parent)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    write_json(temporary, document)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # whoever came first is compared with this one by the caller
    finally:
        temporary.unlink()


def ask_again(root: Path, who: str, reason: str) -> dict[str, Any]:
    """Lets the program ask once more for a run whose reply was lost; the ledger keeps who said so and why."""
    folder = CampaignFolder(root)
    if not reason.strip():
        raise ValueError("expected a reason to ask again, got none: say what was lost and why asking is no second look")
    with Lock(folder.lock):
        record = open_record(root)
        _target(record.campaign.judge.told_scores, root)
        lost = [
            one
            for one in listed(root)
            if one["state"] == "lost" and who in (one["candidate"], f"{one['candidate']}/{one['seed']}", one["run"])
        ]
        if len(lost) != 1:
            raise ValueError(f"expected one run with a lost reply, {who!r} names {len(lost)}: see `external list`")
        (one,) = lost
        _check_unjudged(record.events, one["run"])
        ledger = Ledger(root)
        try:
            count = len(ledger.keys("external-again"))
            ledger.append("external-again", f"{one['run']}/{count + 1}", {"run": one["run"], "reason": reason})
        finally:
            ledger.close()
    return {**one, "state": "asked again", "reason": reason}


def open_final(root: Path, who: str) -> dict[str, Any]:
    """Keeps an operator's word that the sealed half be opened, and returns the word that stands: the first one's.

    Raises ValueError for nobody's word, before the last round is closed, and once the half was opened.
    """
    if not who.strip():
        raise ValueError("expected who says that the sealed half be opened, got a blank: name somebody with --by")
    written = open_written(root)
    if (opened := written.data("final-opened")) is not None:
        raise ValueError(
            f"the sealed half of the campaign in {root} was opened on the word of {opened['by']}, and opens once: read "
            "what it told with `megatron-evolve status`"
        )
    if written.data("final-awaited") is None:
        raise ValueError(
            f"the campaign in {root} does not wait for its sealed half: it opens once, after the last round, where the "
            "campaign says `open_final: by-operator`"
        )
    _write_once(written.folder.open_final, {"by": who})
    return read_json(written.folder.open_final)


def _target(target: ExternalScores | None, root: Path) -> ExternalScores:
    if target is None:
        raise ValueError(
            f"the campaign in {root} asks its external target itself: scores are submitted only where judge.external "
            "is of kind reported or command"
        )
    return target
