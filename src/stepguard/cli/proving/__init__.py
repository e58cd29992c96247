"""`stepguard prove`: a program is run undisturbed and through faults, and the runs are compared."""
