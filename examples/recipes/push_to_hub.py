"""The newest weights of a run on the Hub: ``Saving(on_commit=PushToHub("someone/digits"))``.

It needs `pip install huggingface_hub`, and a token: `hf auth login`, or HF_TOKEN.
"""

import subprocess
import tempfile
from pathlib import Path

from huggingface_hub import HfApi


class PushToHub:
    """Make it in the chief only. Each commit of the run is a commit of the repository."""

    def __init__(self, repository, **create):
        self._repository = repository
        self._api = HfApi()
        self._api.create_repo(repository, exist_ok=True, **create)

    def __call__(self, committed):
        """Called by the run, on a thread of its own: training does not wait."""
        with tempfile.TemporaryDirectory() as place:
            weights = Path(place) / "model.safetensors"
            subprocess.run(["stepguard", "export", committed.path, weights, "--weights"], check=True)
            self._api.upload_file(
                repo_id=self._repository,
                path_or_fileobj=weights,
                path_in_repo=weights.name,
                commit_message=f"step {committed.step}",
            )
