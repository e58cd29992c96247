"""The tests of the PyTorch engine; they are passed over where PyTorch is not installed."""

import importlib.util
import sys
from pathlib import Path

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*"]

sys.path.insert(0, str(Path(__file__).parent))
# For what breaks disks: its modules know no framework.
sys.path.append(str(Path(__file__).parent.parent / "process"))
