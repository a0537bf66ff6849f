"""Mathematical equality, checked by the library math-verify in a process of its own.

Computer algebra can run for ever, or eat the machine, on an answer such as 9^9^9^9, and signals reach the main thread
only. So a worker process does it, with a limit on its memory; at the time limit it is killed and a new one started.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

from opd.errors import OpdError, UsageError

START_SECONDS = 120.0  # to import sympy on a busy machine
MEMORY_BYTES = 4 * 2**30


class BadTruth(ValueError):  # noqa: N818
    """The right answer is no mathematical expression."""


class MathVerifier:
    """`right(truth, text)` within a wall-clock limit. One question at a time; not for several threads.

    Raises `UsageError` where math-verify is not installed.
    """

    def __init__(self, seconds: float) -> None:
        if find_spec("math_verify") is None:
            raise UsageError("math_verify needs the library math-verify: pip install 'opd[math]'")
        self.seconds = seconds
        self.timeouts = 0  # answers given up on, at the time limit or because the worker died on them
        self._worker: subprocess.Popen[bytes] | None = None

    def right(self, truth: str, text: str) -> bool | None:
        """Whether the text's final expression equals the truth; None when that was given up on, which is counted.

        Raises `BadTruth` when the truth is no expression.
        """
        worker = self._started()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps([truth, text]).encode() + b"\n")
            worker.stdin.flush()
            reply = self._reply(worker, self.seconds)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.close()
            self.timeouts += 1
            return None
        if reply == "no truth":
            raise BadTruth(f"{truth!r} is no mathematical expression")
        if reply == "failed":
            self.timeouts += 1
        return reply if isinstance(reply, bool) else None

    def close(self) -> None:
        """Kill the worker, if there is one. The next question starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def __del__(self) -> None:
        if getattr(self, "_worker", None) is not None:
            self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            command = [sys.executable, "-m", "opd.verify_math", str(self.seconds)]
            self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._reply(self._worker, START_SECONDS) != "ready":
                self.close()
                raise OpdError(f"the process that runs math-verify did not start within {START_SECONDS:.0f} seconds")
        return self._worker

    @staticmethod
    def _reply(worker: subprocess.Popen[bytes], seconds: float) -> Any:
        """The worker's next line, or None when it ends or the time is over."""
        assert worker.stdout is not None
        pipe, line = worker.stdout.fileno(), b""
        until = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            more = os.read(pipe, 4096) if ready else b""
            if not more:
                return None
            line += more
        return json.loads(line)


def compare(truth: str, text: str) -> bool | str:
    """math-verify's verdict, "no truth" or "failed". Has no time limit."""
    from math_verify import parse, verify

    try:
        gold = parse(f"${truth.strip().strip('$')}$", parsing_timeout=None)
        if not gold:
            return "no truth"
        return bool(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))
    except (MemoryError, RecursionError, OverflowError):
        return "failed"


def _serve(seconds: float) -> None:
    """Answer one JSON line per line of input, until there is none."""
    import logging
    import resource
    import signal

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)  # it warns about the limits that are set here instead
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)  # ends this process even if its parent is gone
        print(json.dumps(compare(*json.loads(line))), file=out, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
