"""The full disk of a proof: what trains can write nothing, and nobody else is under the limit, then or later."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import types

import pytest

from stepguard.cli.proving import faults
from stepguard.cli.proving.faults import Fault
from stepguard.cli.proving.full_disk import FullDisk
from stepguard.watching import heartbeat
from stepguard.watching.heartbeat import Heartbeat

pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the limit of another process needs Linux")

# Starts a child for each line that it reads, and prints the child's pid.
PARENT = """
import subprocess, sys
for line in sys.stdin:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    print(child.pid, flush=True)
"""


@pytest.fixture
def parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def child_of(parent):
    parent.stdin.write(b"\n")
    parent.stdin.flush()
    return int(parent.stdout.readline())


def limit(pid):
    return resource.prlimit(pid, resource.RLIMIT_FSIZE)


def test_a_process_that_is_born_meanwhile_gets_its_limit_back(parent):
    before = limit(parent.pid)
    disk = FullDisk([parent.pid])
    spared, late = child_of(parent), child_of(parent)
    assert [limit(one)[0] for one in (parent.pid, spared, late)] == [0, 0, 0]

    disk.spare([parent.pid, spared])
    assert [limit(one)[0] for one in (parent.pid, spared, late)] == [0, before[0], 0]

    disk.end([parent.pid, spared, late])
    assert [limit(one) for one in (parent.pid, spared, late)] == [before] * 3


def test_only_processes_that_train_get_the_limit(parent, tmp_path):
    worker = child_of(parent)
    heartbeat.prepare(tmp_path)
    heartbeat.write(tmp_path, Heartbeat("chief", pid=parent.pid))
    heartbeat.write(tmp_path, Heartbeat("worker-1", pid=os.getpid()))  # of somebody else
    seen = []

    def wait_for(is_so):
        seen.append([limit(one)[0] for one in (parent.pid, worker, os.getpid())])
        while not is_so():
            pass
        return True

    before = limit(worker)
    running = types.SimpleNamespace(descendants=lambda: [parent.pid, worker], wait_for=wait_for)
    live = types.SimpleNamespace(logdir=tmp_path, step=lambda: 9)
    done = faults._fill_disk(Fault("disk", 5, 0.0, 0.5, lasts_secs=0.05), running, live)

    assert done.is_done
    assert seen == [[0, before[0], limit(os.getpid())[0]]]
    assert limit(parent.pid) == before
