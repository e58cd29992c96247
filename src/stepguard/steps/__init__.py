"""What the sessions of loop frameworks share: where steps end, who may run one, and what a process goes on from.

It knows no framework. `boundary` is the moment between two steps, `interrupts` what Ctrl-C does to one, `gate` where a
step waits for the other processes, `rendezvous` how these agree, over the `common_store`. `session` is the loop, and
`engine` what every engine of one has; `process_state` what belongs to one process of it: its `feeds` and its
`random_streams`. `values` are the program's own.
"""
