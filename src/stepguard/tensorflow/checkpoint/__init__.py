"""Checkpoints of TensorFlow programs: how they are taken, written, found and restored."""
