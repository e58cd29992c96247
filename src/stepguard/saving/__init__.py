"""How a run is saved: when a snapshot is taken, the thread that makes it durable, and what is not worth keeping."""
