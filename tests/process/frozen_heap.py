"""Imported last by what processes are forked from: their garbage collectors pass over all that was imported before.

Else each process copies, page by page, what its collector looks through, again when its interpreter ends.
"""

import gc

gc.collect()
gc.freeze()
