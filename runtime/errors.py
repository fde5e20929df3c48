"""Everything that can go wrong, and whose doing it is.

PacelineError
├── UserError (ValueError)        the user's: one line, exit code 2
│   ├── ConfigError               a flag, a key or a value
│   ├── ModelError                a folder, a file or an architecture
│   ├── PromptError               a prompt or a sampling parameter
│   └── PlacementError            more devices asked for than there are
├── OverloadedError               the queue is full: try again later
└── EngineError (RuntimeError)    ours or the machine's: exit code 1
    ├── ShardError                a rank failed or died
    ├── ShuttingDownError         the server takes no more requests
    └── DeadlineError             something did not answer in time
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of all errors Paceline raises on purpose."""


class UserError(PacelineError, ValueError):
    """Something the user can mend. The message is one line and says how."""


class ConfigError(UserError):
    """An unknown or impossible setting."""


class ModelError(UserError):
    """A model that is missing, damaged, unsupported or unfit for its partner."""


class PromptError(UserError):
    """A prompt or sampling parameter that cannot be served."""


class PlacementError(UserError):
    """The cluster cannot hold the ranks asked for."""


class OverloadedError(PacelineError):
    """More requests wait than may. Nobody is at fault; `retry_after_s` says when to come back."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(PacelineError, RuntimeError):
    """The engine cannot go on."""


class ShardError(EngineError):
    """A rank failed or died. Others can be started in the place of all."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class DeadlineError(EngineError):
    """What was waited for did not come in time."""


class ShuttingDownError(EngineError):
    """The server is being stopped: what runs may finish, nothing new begins."""
