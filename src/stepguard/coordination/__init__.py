"""The coordinator and the threads that it stops together: loopers on timers, services, signals, and the time limit.

A stop may also come from outside of the program (`outside_stop`), and with the end of the process (`process_exit`).
"""
