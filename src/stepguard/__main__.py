"""``python -m stepguard`` runs the command ``stepguard``, as its script does, even if that is not on the path.

Ctrl-C ends the process without a word until a command begins; see `stepguard.cli.interrupts`. The interpreter's own
start, before this module, is out of reach.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command that the arguments name. Ends the process."""
    # Where SIGINT is ignored, as in a background job of a script, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from stepguard.cli.main import main as run_the_command

    run_the_command()


if __name__ == "__main__":
    main()
