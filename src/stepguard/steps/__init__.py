"""The code that the engines of all loop frameworks share. It knows no framework.

`boundary` finds the moments between two steps, and `interrupts` holds Ctrl-C back until then. `gate` is where a step
waits for the other processes, and `rendezvous` is how the processes agree, over the `common_store`. `session` is the
training loop, and `engine` is the base of its engine. `process_state` is the state of one process: its `feeds` and its
`random_streams`. `values` are plain values of the program.
"""
