"""Execute one notebook in a process of its own: a script that reads what to do from standard input.

The process ends, and its kernel with it, when standard input does: neither outlives the one who started them.  It
imports nothing of s3lab, so that it starts in a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from threading import Thread
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

_GRACE_S = 10.0


def execute(notebook: str, to: str, parameters: dict[str, Any], cwd: str, socket: str) -> None:
    """Run a notebook with papermill, keeping the executed one; exit with a one-line message if a cell fails.

    The kernel listens on files that begin with ``socket``, not on ports that everyone on the machine can reach.
    """
    try:
        papermill.execute_notebook(
            notebook,
            to,
            parameters,
            cwd=cwd,
            progress_bar=False,
            config=Config(KernelManager={"transport": "ipc", "ip": socket}),
        )
    except PapermillExecutionError as failure:
        sys.exit(f"{failure.ename}: {failure.evalue}".splitlines()[0])
    except DeadKernelError:
        sys.exit("its kernel died, most often for want of memory")


def _stop_with_input() -> None:
    """Wait for the end of standard input, then interrupt this process, and end it if that does not."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
    order = json.loads(sys.stdin.readline())
    Thread(target=_stop_with_input, daemon=True).start()
    execute(**order)
