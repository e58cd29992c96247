"""A run with a mirror in a process of its own: `mirrored_child.py LOGDIR URL STEPS`. It waits for each checkpoint.

With AWAITS it says that it is ready, and begins once that file is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mirrors

from stepguard.testing import FakeEngine


class Padded(FakeEngine):
    """An engine whose checkpoints have another file of as many bytes as PADDING says."""

    def write(self, snapshot, stage, name):
        digests = super().write(snapshot, stage, name)
        if padding := int(os.environ.get("PADDING", "0")):
            (stage / name / "padding.bin").write_bytes(os.urandom(padding))
        return digests


if __name__ == "__main__":
    logdir, url, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    grace, lease = float(os.environ.get("GRACE", "20")), float(os.environ.get("LEASE", "60"))
    if "AWAITS" in os.environ:
        print("ready", flush=True)
        mirrors.wait_until(Path(os.environ["AWAITS"]).exists)
    sv = mirrors.supervisor(logdir, url, every=1, keep=2, grace=grace, lease_secs=lease, engine=Padded())
    with sv.managed_session() as session:
        for _ in range(steps):
            mirrors.save_step(sv, session)
            if "WAITS_NOT" not in os.environ:
                mirrors.wait_until(lambda: sv._saving._mirror._uploader.left is None)
            print(session.step, flush=True)
