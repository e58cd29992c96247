"""`stepguard prove` on a program that is forked from a process that has imported PyTorch: a start takes no seconds."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from forked import begin

from stepguard.cli.proving import report
from stepguard.cli.proving.program import Clock, Program, Running
from stepguard.cli.proving.proof import NotTriedError, Options, Proof
from stepguard.cli.proving.scratch import Scratch


class ForkedProgram(Program):
    """Starts the program by a fork of this process, in place of a new interpreter."""

    def start(self, environment):
        """Start it."""
        reader, writer = os.pipe()
        processes = self._processes
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.environ.update(environment)
            self._run()
        os.close(writer)
        return Running(processes, pid, reader, self.clock, is_shown=False)

    def _run(self):
        code = 1
        try:
            sys.argv = list(self.argv)
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except KeyboardInterrupt:
            atexit._run_exitfuncs()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:  # noqa: BLE001 - what ends a program is printed
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def main(argv: list[str], steps: int, faults: tuple[str, ...], place: str) -> None:
    """Prove a program in this new process; the document of the verdict is written to ``place/verdict.json``."""
    import torch

    begin(f"{place}/output")
    torch.set_num_threads(1)
    os.chdir(place)
    options = Options(steps, faults, 0)
    scratch = Scratch(Path(place))
    program = ForkedProgram(argv, Clock(150), environment={}, is_shown=False)
    quiet = {"show": lambda *_: None, "tell": lambda *_: None, "say": print}
    try:
        document = report.document(Proof(program, scratch, options, **quiet).prove(), argv, options)
    except NotTriedError as error:
        document = {"verdict": "not tried", "reason": str(error), "lines": error.lines}
    Path(place, "verdict.json").write_text(json.dumps(document, default=str))
