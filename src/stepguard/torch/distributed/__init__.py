"""Several processes that train one model: agreed steps, and one checkpoint written by all."""
