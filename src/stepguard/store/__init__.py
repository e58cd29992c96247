"""The store: a directory of checkpoints. It commits, lists, verifies, finds the newest good one, and prunes.

It knows no framework. One noun a module: `checkpoint` what the store answers with, `manifest` the commit record,
`layout` which files belong to a checkpoint, `verification`, `recovery`, `retention`, `statefile` the file for
TensorFlow's tools, `lock` the chief's lock, and `checkpoint_store`, which puts them together.
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
