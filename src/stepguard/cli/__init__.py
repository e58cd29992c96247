"""The command ``stepguard``: a person's view of a logdir. Each command is one file; `main` puts them together.

Nothing in here is imported by the rest of the package, and only a command that reads tensors loads a framework.
"""
