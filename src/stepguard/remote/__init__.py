"""Places that hold a second copy of a run: object stores, and directories, behind one small protocol.

`objects` is the protocol, `directory` and `object_store` are its two kinds, `opening` chooses one by an address.
`copies` has the checkpoints in such a place, `history` the ledger and the event files beside them, and `lease` says
which machine may write there. Nothing here knows a framework, or a run that is going on.
"""
