"""Run blocks of Python, each in a process of its own that has what takes seconds to import already.

``run_blocks.py MODULES JOBS``: MODULES are imported before, as in ``a,b``; JOBS is a file with a JSON list of objects:
``name``, ``code``, ``folder`` to run in, ``copies`` to make before, as pairs of paths. Writes a JSON list of what
became of them to standard output: ``name``, ``status``, ``out``, ``err``. The next starts when one has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

_LONGEST_SECS = 150


def run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _run_here(job)
        _, status = os.waitpid(pid, 0)
        for stream in (out, err):
            stream.seek(0)
        return {"name": job["name"], "status": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}


def _run_here(job: dict[str, Any]) -> None:
    status = 1
    signal.alarm(_LONGEST_SECS)
    try:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        for source, target in job["copies"]:
            if not Path(target).exists():
                shutil.copytree(source, target)
        os.chdir(folder)
        exec(compile(job["code"], job["name"], "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the other process has to hear of it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # What was imported before the fork is not ours to end.
        os._exit(status)


if __name__ == "__main__":
    # Nothing runs on the threads of a framework that was only imported.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    for module in sys.argv[1].split(","):
        importlib.import_module(module)
    json.dump([run(job) for job in json.loads(Path(sys.argv[2]).read_text())], sys.stdout)
