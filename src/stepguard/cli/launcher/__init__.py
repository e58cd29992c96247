"""The life of `stepguard run`: processes, signals, restarts, and how an attempt ended."""
