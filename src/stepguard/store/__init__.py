"""The store: a directory of checkpoints. It commits, lists, verifies, finds the newest good one, and prunes.

It knows no framework. `checkpoint` has the objects that the store returns, `manifest` the commit record, `layout` the
files of a checkpoint, `tensorflow_files` the names that TensorFlow's tools give them, `statefile` the file for these
tools, `lock` the chief's lock. `verification`, `recovery` and `retention` have one task each, and `checkpoint_store`
puts them together.
"""

from stepguard.store.checkpoint import Checkpoint, Damage, Recovery
from stepguard.store.checkpoint_store import CheckpointStore, NameTakenError
from stepguard.store.lock import LogdirHold
from stepguard.store.manifest import FileRecord, Manifest

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Damage",
    "FileRecord",
    "LogdirHold",
    "Manifest",
    "NameTakenError",
    "Recovery",
]
