"""Commands on a logdir that another process writes, replaces and prunes as fast as it can."""

import json
import subprocess
import sys
import time
from collections import Counter

WRITER = """
import sys
from stepguard.store import CheckpointStore

root, suffix = sys.argv[1], sys.argv[2] or None
store = CheckpointStore(root, engine="tensorflow" if suffix else "torch", entry_suffix=suffix, max_to_keep=2)
hold = store.acquire()

def save(step):
    name = store.name(step)
    stage = store.stage(name)
    if suffix:
        (stage / f"{name}.index").write_bytes(b"index")
        (stage / f"{name}.data-00000-of-00001").write_bytes(b"data" * (1 + step % 5))
    else:
        (stage / name).mkdir()
        (stage / name / "model.pt").write_bytes(b"weights" * (1 + step % 5))
    store.commit(name, step)
    store.prune()

save(0)
print("first", flush=True)
step = 0
while True:
    step += 1
    save(step)
    if step % 7 == 0:
        save(step)  # replaces it
"""


def test_nothing_is_called_damaged_and_nothing_fails(tmp_path, stepguard, monkeypatch):
    # Between two renames of a commit TensorFlow would be asked to read these files, and they are made up.
    monkeypatch.setitem(sys.modules, "stepguard.tensorflow.tensors", None)
    seen = Counter()
    for suffix in (".index", ""):
        logdir = tmp_path / f"run{suffix}"
        with subprocess.Popen([sys.executable, "-c", WRITER, str(logdir), suffix], stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout.readline() == b"first\n"
                until = time.monotonic() + 1
                while time.monotonic() < until:
                    for command in ("ls", "verify"):
                        shown = stepguard(command, logdir, "--json")
                        assert shown.exit_code == 0, shown.output
                        found = json.loads(shown.stdout)
                        assert found["missing"] == []
                        for one in found["checkpoints"]:
                            assert one["state"] != "damaged", one
                            seen[command, one["state"]] += 1
                    planned = stepguard("prune", logdir, "--keep-last", 1, "--dry-run")
                    assert planned.exit_code == 0, planned.output
                    refused = stepguard("prune", logdir, "--keep-last", 1)
                    assert (refused.exit_code, "found process" in refused.stderr) == (1, True), refused.output
                assert writer.poll() is None, "the writer has failed"
            finally:
                writer.kill()
    assert seen["ls", "good"] > 5
    assert seen["verify", "good"] > 5
