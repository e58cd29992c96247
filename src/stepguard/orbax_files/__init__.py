"""Checkpoints in Orbax's format, written and read without JAX: NumPy arrays, with the types of ml_dtypes.

A checkpoint of Stepguard's is a directory with

- ``d/process-0``, ``d/process-1`` ...: the arrays, one file for each process, each shard as it is in memory;
- ``state.json``: each value of the state with its place in those files; by it Stepguard reads them;
- ``manifest.ocdbt``, ``d/tree``, ``_METADATA``, ``array_metadatas/``, ``_strings.json``: the same for Orbax;
- ``process-0.json`` ...: random states and positions in the data, one file for each process.

One file has all arrays of a process, because each file costs a write to the disk of its own: with two small files for
each array, as in Orbax's format without OCDBT, a state of 1,000 arrays takes ten times as long.
"""
