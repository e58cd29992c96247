"""What every room needs of the machine it runs on: its disk, the JSON that is kept there, and its system.

`files` writes, reads and removes whole files, `new_file` writes a large one in parts, and `appended_file` lets one grow
by records; nothing else of the package writes to the disk. `schema` says what may stand in the JSON that is read, and
`system` has what systems do differently: which process still runs, which has a file open, who has sent a signal.
"""
