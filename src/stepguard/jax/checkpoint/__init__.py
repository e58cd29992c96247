"""Checkpoints of JAX programs: the leaves of a state, their files, and restoring them, whole or sharded."""
