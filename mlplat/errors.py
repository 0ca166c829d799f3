"""Every error the platform raises on purpose, and the one table that maps them to the wire.

Errors cross Ray by pickling, which calls the class with its ``args``: each class therefore takes
exactly one positional argument, the message.
"""

from __future__ import annotations


class PlatformError(Exception):
    """Root of all errors raised on purpose. ``str(error)`` is written for the person who caused it."""

    #: MLflow's ``error_code`` and the HTTP status that goes with it.
    code: str = "INTERNAL_ERROR"
    status: int = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidInput(PlatformError):
    """The request can never succeed as it stands."""

    code = "INVALID_PARAMETER_VALUE"
    status = 400


class InvalidPipeline(InvalidInput):
    """A pipeline definition or its parameters were refused; the message has one problem a line."""


class AlreadyExists(PlatformError):
    """The name is taken. MLflow answers 400 here, and its client depends on that."""

    code = "RESOURCE_ALREADY_EXISTS"
    status = 400


class Conflict(PlatformError):
    """Somebody else was faster: the state is not the one that the request expects. Look again, then decide."""

    code = "RESOURCE_CONFLICT"
    status = 409


class Changed(Conflict):
    """What the request is about is not the version that it names."""

    status = 412


class NotFound(PlatformError):
    """No such experiment, run, model, version, pipeline run or file."""

    code = "RESOURCE_DOES_NOT_EXIST"
    status = 404


class PermissionDenied(PlatformError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"
    status = 403


class Corrupted(PlatformError):
    """Stored bytes are not what they were: they are not to be used. Repeating the request does not help."""

    code = "INVALID_STATE"
    status = 409


class PayloadTooLarge(PlatformError):
    """The body is larger than the route accepts."""

    code = "BAD_REQUEST"
    status = 413


class Overloaded(PlatformError):
    """A bounded queue is full; the same request may succeed after ``Retry-After``."""

    code = "RESOURCE_EXHAUSTED"
    status = 429


class StorageFull(PlatformError):
    """A disk, bucket or quota has no room for more artifacts; waiting alone does not help."""

    code = "RESOURCE_EXHAUSTED"
    status = 507


class Unavailable(PlatformError):
    """A part of the platform is restarting or out of reach; retry."""

    code = "TEMPORARILY_UNAVAILABLE"
    status = 503


class Fenced(Unavailable):
    """This writer's epoch is over: somebody else took the work, nothing was written."""


class PipelineFailed(PlatformError):
    """A pipeline run ended otherwise than SUCCEEDED, and not by an exception of the user's code."""


class BringUpError(PlatformError):
    """The platform could not be started or stopped; the message says what to do."""
