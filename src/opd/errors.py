"""Every error that opd raises on purpose.

    OpdError                 exit code 1   the run failed, and the message says why
    ├── UsageError           exit code 2   the user's recipe, data or command cannot mean what it says
    ├── CheckFailedError          exit code 3   a check or gate that the user asked for did not pass
    └── BudgetSpentError          exit code 4   a limit the user set was reached

A message says what was asked, what was found (with the values), why it matters, and what to do. The command
line prints it without a traceback; anything that is not an `OpdError` is a bug and keeps its traceback.
"""

from __future__ import annotations


class OpdError(Exception):
    """A failure with a sentence for the user."""

    exit_code = 1


class UsageError(OpdError):
    """What the user wrote cannot be done, or not together. `problems` holds one sentence each."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class CheckFailedError(OpdError):
    """A check, probe or gate did not pass."""

    exit_code = 3


class BudgetSpentError(OpdError):
    """A limit that the user set was reached; what was done so far is kept."""

    exit_code = 4
