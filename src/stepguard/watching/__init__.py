"""What a run says of itself: ledger, heartbeats, history, progress line, metrics, and the hang watch."""
