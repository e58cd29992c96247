"""What the ways of watching a run have in common."""

from __future__ import annotations


class Part:
    """One way of watching one process of a run; what it does not override it does not do.

    Threads: :meth:`look` and :meth:`leave` in the observer's thread, :meth:`close` in the one that ends the run.
    """

    def look(self) -> None:
        """Called again and again, at least once a second, until the run stops."""

    def leave(self) -> None:
        """The run has stopped: what is to be seen of it last. This may have to wait for a disk that hangs."""

    def close(self) -> None:
        """Give back what is held. After :meth:`leave`, or instead of it where that hangs."""
