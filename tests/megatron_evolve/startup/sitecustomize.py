"""Watches every Python process that starts with this folder on its path; what for, the environment says.

TEST_KILL_AT   the command line's process kills itself just before the first event "EVENT PATH" that matches the pattern
TEST_OPENED    each opening of this path is noted, with the process, in TEST_OPENED_LOG
"""

import fnmatch
import json
import os
import signal
import sys

KILL_AT = os.environ.get("TEST_KILL_AT") if "megatron_evolve.cli" in sys.orig_argv else None
OPENED, LOG = os.environ.get("TEST_OPENED"), os.environ.get("TEST_OPENED_LOG")
PLACE = {"open": 0, "os.rename": 1}  # which argument is the path that matters


def watch(event: str, arguments: tuple) -> None:
    if event not in PLACE or not isinstance(arguments[PLACE[event]], str | os.PathLike):
        return
    path = os.fspath(arguments[PLACE[event]])
    if KILL_AT and fnmatch.fnmatch(f"{event} {path}", KILL_AT):
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "open" and OPENED and path == OPENED:
        note = json.dumps({"process": sys.argv if len(sys.argv) > 1 else sys.orig_argv}) + "\n"
        log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(log, note.encode())
        os.close(log)


sys.addaudithook(watch)
