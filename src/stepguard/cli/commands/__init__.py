"""The commands, one file each: `command` is what the command line calls."""
