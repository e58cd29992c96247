"""The coordinator and the threads that it stops together: loopers on timers, services, and the SIGTERM watch."""
