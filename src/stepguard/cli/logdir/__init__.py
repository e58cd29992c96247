"""Reading a logdir: its checkpoints, their tensors, the event files, and the state of its run."""
