"""An engine process ends with the process that started it, however that one ended.

vLLM's engine goes on without its client: after a SIGKILL of a run it would keep its memory, or its GPU, for ever.
"""

from __future__ import annotations

import os
import select
import threading

OWNER_VARIABLE = "SLIPSTREAM_OWNER_PID"
"""In the environment of every engine process."""


def end_with_owner() -> None:
    """Watch the owner from a thread of its own. Waits for: its end, told by the kernel."""
    try:
        owner = os.pidfd_open(int(os.environ[OWNER_VARIABLE]))
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_outlive, args=(owner,), name="owner", daemon=True).start()


def _outlive(owner: int) -> None:
    watch = select.poll()
    watch.register(owner, select.POLLIN)
    watch.poll()
    # No clean-up: whoever could want something of this process is gone.
    os._exit(1)
