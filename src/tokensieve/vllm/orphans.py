"""End vLLM's further processes when the one that started them is gone.

vLLM's engine waits for ever for the requests of a server that was killed (SIGKILL, or the system out of memory), with
the model in memory: the next server finds the device full.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

VARIABLE = "TOKENSIEVE_END_WITH_PARENT"
"""Set by `tokensieve serve`; other programs may start engines in another way, and keep vLLM's."""


def end_with_parent() -> None:
    """End this process when its parent ends; do nothing in the first process, or where the variable is not set."""
    parent = multiprocessing.parent_process()
    if parent is None or not os.environ.get(VARIABLE):
        return

    def wait() -> None:
        parent.join()
        os._exit(1)  # threads that wait for the parent's messages would hold up an ordinary exit

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
