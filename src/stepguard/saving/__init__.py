"""How a run is saved and restored: when snapshots are taken, the writer thread, the NaN guard, the restore policy."""
