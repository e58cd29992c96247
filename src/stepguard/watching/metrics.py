"""The metrics of a run for Prometheus. Each request reads them from the record of the run."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.part import Part


@dataclass(slots=True)
class Totals:
    """Sums over the checkpoints of this process: their number, the seconds to write them, their bytes, and the seconds
    that training waited for their snapshots.
    """

    checkpoints: int = 0
    write_secs: float = 0.0
    written_bytes: int = 0
    stall_secs: float = 0.0


class MetricsServer(Part):
    """Serves ``/metrics`` on ``host:port``; port 0 takes a free port. A thread of ``prometheus_client`` answers.

    Raises:
        ModuleNotFoundError: ``prometheus_client`` is not installed; the message says how to install it.
        OSError: the port is not available; the message names it.
    """

    def __init__(self, now: Heartbeat, totals: Totals, *, host: str, port: int, run: str = "") -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "metrics_port needs the package prometheus_client: pip install 'stepguard[metrics]'"
            ) from error

        registry = CollectorRegistry()
        registry.register(_Collector(now, totals, run))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise OSError(
                error.errno,
                f"metrics_port={port}: {host}:{port} cannot be served ({error.strerror or error}); choose another "
                f"port, or 0 for a free one",
            ) from error
        _servers.add(self)
        shown = f"[{host}]" if ":" in host else host
        self.url = now.metrics_url = f"http://{shown}:{self._server.server_port}/metrics"
        self._now = now

    def leave(self) -> None:
        """Remove the URL from the heartbeat, because the server is about to close."""
        self._now.metrics_url = None

    def close(self) -> None:
        """Stop serving, and join the server's thread."""
        _servers.discard(self)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# The open servers. A forked child closes their sockets, so that a child that outlives the process frees the port.
_servers: weakref.WeakSet[MetricsServer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server._server.socket.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _Collector:
    def __init__(self, now: Heartbeat, totals: Totals, run: str) -> None:
        self._now = now
        self._totals = totals
        self._labels = {"run": run, "host": now.host, "role": now.role}

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

        now, totals, checkpoint = self._now, self._totals, self._now.last_checkpoint
        gauges: dict[str, tuple[Any, str]] = {
            "step": (now.step, "Steps done"),
            "steps_per_second": (now.steps_per_sec, "Steps per second, over the last half minute"),
            "total_steps": (now.total_steps, "The step that the run trains to, where it is known"),
            "checkpoint_step": (checkpoint and checkpoint["step"], "The step of the newest good checkpoint"),
            "checkpoint_bytes": (checkpoint and checkpoint["bytes"], "The size of the newest good checkpoint"),
            "seconds_since_checkpoint": (
                checkpoint and time.time() - checkpoint["time"],
                "Seconds since the newest good checkpoint was committed",
            ),
        }
        for name, (value, text) in gauges.items():
            if value is not None:
                yield self._with_role(GaugeMetricFamily(f"stepguard_{name}", text, labels=list(self._labels)), value)
        if now.cadence is not None:
            yield from self._paced(now.cadence)
        replay = now.replay
        if replay is not None:
            yield self._with_role(
                GaugeMetricFamily(
                    "stepguard_replay_differs", "Whether steps that were done again differ", labels=list(self._labels)
                ),
                int(replay["outcome"] == "differs"),
            )
        counters = {
            "save_failures": (now.save_failures, "Tries to save that failed"),
            "restarts": (now.restarts, "Starts of this run after a crash"),
            "checkpoint_written_bytes": (totals.written_bytes, "Bytes written in checkpoints by this process"),
        }
        for name, (count, text) in counters.items():
            yield self._with_role(CounterMetricFamily(f"stepguard_{name}", text, labels=list(self._labels)), count)
        summaries = {
            "checkpoint_seconds": (totals.write_secs, "Seconds to write and commit a checkpoint"),
            "snapshot_stall_seconds": (totals.stall_secs, "Seconds that training waited for a snapshot"),
        }
        for name, (secs, text) in summaries.items():
            summary = SummaryMetricFamily(f"stepguard_{name}", text, labels=list(self._labels))
            summary.add_metric(list(self._labels.values()), count_value=totals.checkpoints, sum_value=secs)
            yield summary

    def _paced(self, cadence: dict[str, Any]) -> Iterator[Any]:
        """What ``Saving(overhead=...)`` has come to."""
        from prometheus_client.core import GaugeMetricFamily

        gauges = {
            "checkpoint_interval_seconds": (cadence["interval_secs"], "Seconds from one checkpoint to the next"),
            "checkpoint_cost_ratio": (cadence["cost"], "The part of the time that checkpoints have cost"),
            "checkpoint_bytes_per_day": (cadence["bytes_per_day"], "Bytes that checkpoints write in a day"),
        }
        for name, (value, text) in gauges.items():
            yield self._with_role(GaugeMetricFamily(f"stepguard_{name}", text, labels=list(self._labels)), value)

    def _with_role(self, family: Any, value: float) -> Any:
        family.add_metric(list(self._labels.values()), value)
        return family
