"""The errors a user can cause, by what they must put right."""


class MultiTurnError(Exception):
    """Base of every error of this package; the message says what, where and the remedy."""


class SessionError(MultiTurnError):
    """One session of the input cannot be used.

    `reason` is a short slug, equal for all sessions that fail alike; tallies and the
    manifest count by it.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_session_error, (str(self), self.reason))


class DatasetError(MultiTurnError):
    """A preprocessed dataset is missing, incomplete or does not fit its use."""


class ConfigError(MultiTurnError):
    """The flags ask for something that would fail or silently bias the training."""


def _rebuild_session_error(message: str, reason: str) -> SessionError:
    return SessionError(message, reason=reason)
