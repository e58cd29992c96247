"""The coordinator and the threads that it stops together: loopers on timers, services, signals, and the time limit."""
