"""The interface of every way of watching a run."""

from __future__ import annotations


class Part:
    """One way of watching one process of a run. The methods do nothing unless they are overridden.

    Threads: :meth:`look` and :meth:`leave` run in the observer's thread, :meth:`close` in the thread that ends the run.
    """

    def look(self) -> None:
        """Look at the run. Called at least once a second until the run stops."""

    def leave(self) -> None:
        """Show the final state of a stopped run. This may have to wait for a disk that hangs."""

    def close(self) -> None:
        """Release the resources. Called after :meth:`leave`, or while :meth:`leave` hangs."""
