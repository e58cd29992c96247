"""How a run is watched: ledger, heartbeats, history, progress line, metrics, and the hang watch."""
