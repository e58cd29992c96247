"""The store: a directory of checkpoints. It commits, lists, verifies, finds the newest good one, and prunes.

It knows no framework. `checkpoint` has the objects that the store returns, `manifest` the commit record, `layout` the
files of a checkpoint, `tensorflow_files` the names that TensorFlow's tools give them, `statefile` the file for these
tools and `stated` what the chief says in it, `lock` the chief's lock and `held_logdir` how it is kept. `staging`,
`verification`, `recovery`, `earlier` and `retention` have one task each, and `checkpoint_store` puts them together.
"""

from stepguard.store.checkpoint import Checkpoint, Damage, Recovery
from stepguard.store.checkpoint_store import CheckpointStore
from stepguard.store.lock import LogdirHold
from stepguard.store.manifest import FileRecord, Manifest
from stepguard.store.staging import NameTakenError

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
