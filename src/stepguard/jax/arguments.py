"""Checks the constructor's options, so that a wrong one is reported before anything is built or written."""

from __future__ import annotations

from stepguard.loop_supervisor import check_world
from stepguard.options import Options, Restoring, Watching, refuse


def check(options: Options, watching: Watching | None, restoring: Restoring | None, processes: int) -> None:
    """Refuse the options that mean nothing in a JAX program.

    Raises:
        ValueError: the message names the option.
    """
    refuse(
        watching,
        "peer_timeout_secs",
        because="it is for TensorFlow's servers; with JAX it is the timeout of jax.distributed.initialize",
    )
    refuse(restoring, "hyperparameters", because="in JAX the optimizer's settings are code, or leaves of the state")
    check_world(options, "jax.distributed", processes)
