"""Several processes that train one model: they save at agreed steps, and write one checkpoint together."""
