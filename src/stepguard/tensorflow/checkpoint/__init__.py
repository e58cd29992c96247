"""Checkpoints of TensorFlow programs: taking, writing, finding, and restoring them."""
