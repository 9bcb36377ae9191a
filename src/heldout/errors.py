"""Errors a user can act on. Each knows its OpenAI code, the parameter it concerns and its HTTP status.

Everything else (a bug, a full disk) stays an ordinary exception and is reported as such.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what, where and what to do."""

    type = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    status = 400

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code if code is not None else self.code
        self.param = param if param is not None else self.param


class InvalidValue(UserError, ValueError):
    """A value in the request or the settings is out of its range."""

    code = "invalid_value"


class InvalidTrainingFile(UserError, ValueError):
    """The training file cannot be trained on."""

    code, param = "invalid_training_file", "training_file"


class InvalidValidationFile(UserError, ValueError):
    """The validation file cannot be used to stop training."""

    code, param = "invalid_validation_file", "validation_file"


class InvalidHoldoutFile(UserError, ValueError):
    """The holdout file cannot carry a verdict."""

    code, param = "invalid_holdout_file", "holdout_file"


class NotFound(UserError, LookupError):
    """There is nothing by that id."""

    status = 404


class ModelNotFound(NotFound):
    """No such model; the message names what was tried."""

    code, param = "model_not_found", "model"


class InvalidState(UserError):
    """The job is not in a status that allows this."""

    code = "invalid_status"


class CheckpointDamaged(UserError):
    """A checkpoint cannot be read back: it was written half, or changed since."""

    code = "checkpoint_damaged"


class Unauthorized(UserError):
    """The API key is missing or wrong."""

    code, status = "invalid_api_key", 401


class Forbidden(UserError):
    """The thing exists, but not for this."""

    code, status = "insufficient_permissions", 403


class NotReleased(UserError):
    """The model's verdict is not `ship`, and nobody has released it."""

    code, param, status = "model_not_released", "model", 403


class TooLarge(UserError):
    """More bytes than the server takes."""

    code, status = "content_too_large", 413


class ContextLengthExceeded(UserError, ValueError):
    """The conversation does not fit the model's context."""

    code, param = "context_length_exceeded", "messages"

    @classmethod
    def of(cls, tokens: int, limit: int) -> ContextLengthExceeded:
        """In the sentence that clients know."""
        return cls(
            f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} "
            "tokens. Please reduce the length of the messages."
        )


class EngineUnavailable(UserError):
    """The inference process does not answer yet; the client may try again."""

    type = "server_error"
    code, status = "engine_unavailable", 503


class JobCancelled(Exception):
    """The job was cancelled; every stage may raise it at a safe point."""


class JobPaused(Exception):
    """The job was asked to pause; raised by Watch.progress, where a job may safely end.

    `step` is None then. A training loop that has written a checkpoint says so by raising it anew with the
    step that a resumed job continues from.
    """

    def __init__(self, step: int | None = None) -> None:
        super().__init__("the job was asked to pause")
        self.step = step
