"""The error tree. Every error we raise on purpose is one of these; foreign errors are translated once, where they enter.

MlcdnError                      status, retryable: a hint for whoever answers, without importing the web
├── BadInput            400     the caller's words are wrong
│   └── BadTensor       400     … in a tensor: which, where
├── NotFound            404
├── Conflict            409     true elsewhere: a sequence taken, a name in use
├── ModelRefused        422     an artifact that must not be served
├── EventRefused        422     a record that must not act
├── Overloaded          429     retry after `retry_after_s`
├── SettingsInvalid     400     a setting: which, why
├── Unreachable         503     a part of the system: which, where, what to try
├── NotReady            503
└── DeadlineExceeded    504
"""

from __future__ import annotations

from enum import StrEnum


class MlcdnError(Exception):
    """Base of all our errors. Never raised itself."""

    status: int = 500
    retryable: bool = False

    def __init__(self, message: str) -> None:
        if type(self) is MlcdnError:
            raise TypeError("raise a leaf of the tree, not MlcdnError")
        super().__init__(message)


class BadInput(MlcdnError):
    status = 400


class BadTensor(BadInput):
    """A tensor that the model's signature does not allow; the message names tensor, index and value."""


class SettingsInvalid(BadInput):
    """A setting that cannot be used; the message names it, its source and why."""


class NotFound(MlcdnError):
    status = 404


class Conflict(MlcdnError):
    status = 409


class ModelRefused(MlcdnError):
    """An artifact that must not be served; `reason` is one line, fit for an event and for a person."""

    status = 422

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Refusal(StrEnum):
    """Why a record of the log does not act. Stable words: they stand in EventRejected and in metrics."""

    TOMBSTONE = "tombstone"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    UNKNOWN_SCHEMA = "unknown_schema"
    WRONG_TOPIC = "wrong_topic"
    WRONG_KEY = "wrong_key"
    UNSIGNED = "unsigned"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    KEY_REVOKED = "key_revoked"
    KEY_NOT_ALLOWED = "key_not_allowed"
    SEQUENCE_NOT_HIGHER = "sequence_not_higher"
    SEQUENCE_CONFLICT = "sequence_conflict"
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_DIGEST = "unknown_digest"
    DUPLICATE = "duplicate"
    NOT_IN_ROLLOUT = "not_in_rollout"
    LATE_VERDICT = "late_verdict"
    CHECKPOINT_AHEAD = "checkpoint_ahead"
    HANDLER_FAILED = "handler_failed"


class EventRefused(MlcdnError):
    """A record that must not act. The next record is handled as if this one had not been there."""

    status = 422

    def __init__(self, refusal: Refusal, detail: str = "") -> None:
        super().__init__(f"{refusal}: {detail}" if detail else str(refusal))
        self.refusal = refusal
        self.detail = detail


class Overloaded(MlcdnError):
    status = 429
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unreachable(MlcdnError):
    """A part of the system that does not answer. `part`, `where` and `hint` make the line a person reads."""

    status = 503
    retryable = True

    def __init__(self, part: str, where: str, hint: str = "") -> None:
        super().__init__(f"{part} at {where} does not answer" + (f"; {hint}" if hint else ""))
        self.part, self.where, self.hint = part, where, hint


class NotReady(MlcdnError):
    status = 503
    retryable = True


class DeadlineExceeded(MlcdnError):
    status = 504
    retryable = True
