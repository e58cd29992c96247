"""What every room needs of the machine it runs on: its disk, the JSON that is kept there, and who holds a file.

`files` is the only door to the disk, `schema` says what may stand in the JSON that comes in by it, and `processes`
knows which process still runs and which has a file open.
"""
