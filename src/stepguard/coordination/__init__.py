"""What stops together, and what stops it: the coordinator, loopers on timers, services, and SIGTERM."""
