"""Checkpoints of PyTorch programs: what is saved, its files, and restoring it, whole or sharded."""
