"""``python -m stepguard`` runs the command ``stepguard`` even if its script is not on the path."""

from __future__ import annotations

from stepguard.cli.main import main

if __name__ == "__main__":
    main()
