"""The errors of the platform and what they are on the wire."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import cloudpickle
import pytest

from mlplat import errors
from mlplat.errors import PlatformError


def all_errors(root: type[PlatformError] = PlatformError) -> Iterator[type[PlatformError]]:
    yield root
    for child in root.__subclasses__():
        yield from all_errors(child)


ALL = [error for error in all_errors() if error.__module__ == errors.__name__]


def test_the_module_has_no_error_outside_of_the_tree() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(ALL)
    assert len(ALL) >= 11


@pytest.mark.parametrize("error", ALL)
@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_every_error_survives_pickling_with_its_message(error: type[PlatformError], pickler: object) -> None:
    dumps, loads = getattr(pickler, "dumps"), pickle.loads  # noqa: B009 - both modules have it
    copy = loads(dumps(error("first line\nsecond ü")))
    assert type(copy) is error
    assert copy.message == str(copy) == "first line\nsecond ü"


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (errors.PlatformError, "INTERNAL_ERROR", 500),
        (errors.InvalidInput, "INVALID_PARAMETER_VALUE", 400),
        (errors.InvalidPipeline, "INVALID_PARAMETER_VALUE", 400),
        (errors.PipelineFailed, "INTERNAL_ERROR", 500),
        (errors.AlreadyExists, "RESOURCE_ALREADY_EXISTS", 400),
        (errors.Conflict, "RESOURCE_CONFLICT", 409),
        (errors.Changed, "RESOURCE_CONFLICT", 412),
        (errors.StorageFull, "RESOURCE_EXHAUSTED", 507),
        (errors.Corrupted, "INVALID_STATE", 409),
        (errors.NotFound, "RESOURCE_DOES_NOT_EXIST", 404),
        (errors.PermissionDenied, "PERMISSION_DENIED", 403),
        (errors.PayloadTooLarge, "BAD_REQUEST", 413),
        (errors.Overloaded, "RESOURCE_EXHAUSTED", 429),
        (errors.Unavailable, "TEMPORARILY_UNAVAILABLE", 503),
        (errors.Fenced, "TEMPORARILY_UNAVAILABLE", 503),
        (errors.BringUpError, "INTERNAL_ERROR", 500),
    ],
)
def test_codes_and_statuses(error: type[PlatformError], code: str, status: int) -> None:
    assert (error("x").code, error("x").status) == (code, status)


def test_every_error_is_in_the_table_above() -> None:
    assert len(ALL) == 16


def test_a_refused_pipeline_is_refused_input_and_a_fenced_writer_unavailable() -> None:
    assert issubclass(errors.InvalidPipeline, errors.InvalidInput)
    assert issubclass(errors.Fenced, errors.Unavailable)


@pytest.mark.parametrize("error", ALL)
def test_every_error_takes_exactly_a_message(error: type[PlatformError]) -> None:
    with pytest.raises(TypeError):
        error()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        error("a", "b")  # type: ignore[call-arg]
