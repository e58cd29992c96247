"""The command ``stepguard``: a person's view of a logdir. One file a command; `main` puts them together.

Nothing in here is imported by the rest of the package, and a framework is loaded only by a command that reads tensors.
"""
