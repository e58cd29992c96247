"""``python -m stepguard.tensorflow PROGRAM [ARGS]``: an unchanged program, supervised by Stepguard."""

from __future__ import annotations

import os
import runpy
import sys

_USAGE = """\
usage: python -m stepguard.tensorflow PROGRAM [ARGS ...]
       python -m stepguard.tensorflow -m MODULE [ARGS ...]

Runs a TensorFlow program unchanged, with tf.compat.v1.train.Supervisor replaced by Stepguard's."""


def main(arguments: list[str]) -> int:
    """Run the program named by ``arguments`` as ``__main__``, and exit with the program's exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        stream = sys.stdout if arguments else sys.stderr
        stream.write(_USAGE + "\n")
        return 0 if arguments else 2
    is_module = arguments[0] == "-m"
    program, *rest = arguments[1:] if is_module else arguments
    if not is_module and not os.path.exists(program):
        sys.stderr.write(f"stepguard: expected a program, found no file {program!r}\n")
        return 2

    from stepguard.tensorflow.install import install

    install()
    sys.argv = [program, *rest]
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        # Absolute, as in Python itself: the program finds the files beside it even after a chdir.
        program = os.path.abspath(program)
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
