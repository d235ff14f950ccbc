import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest

from luthier import errors
from luthier.errors import (
    BY_CODE,
    FieldViolation,
    InvalidArgument,
    LuthierError,
    Reason,
)

BUILT_INS = {
    errors.InvalidArgument: ValueError,
    errors.NotFound: LookupError,
    errors.PermissionDenied: PermissionError,
    errors.Unavailable: ConnectionError,
    errors.DeadlineExceeded: TimeoutError,
    errors.Unimplemented: NotImplementedError,
}


def full(kind: type[LuthierError]) -> LuthierError:
    return kind(
        "rank must be in 1..512, got 0",
        reason=Reason.INVALID_FIELD,
        metadata={"rank": "0"},
        violations=[FieldViolation(field="rank", description="must be in 1..512")],
        retry_after_seconds=1.5,
    )


@pytest.mark.parametrize("kind", [LuthierError, *BY_CODE.values()])
@pytest.mark.parametrize("through", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_luthier_error_keeps_every_part_through_a_pickle(
    kind: type[LuthierError], through: Callable[[LuthierError], LuthierError]
) -> None:
    error = full(kind)
    again = through(error)
    assert type(again) is kind
    for part in ("message", "reason", "metadata", "violations", "retry_after_seconds"):
        assert getattr(again, part) == getattr(error, part), part
    assert str(again) == "rank must be in 1..512, got 0"


def test_by_code_has_each_class_under_a_code_of_its_own() -> None:
    own = [kind for kind in LuthierError.__subclasses__() if kind.__module__ == LuthierError.__module__]
    assert len(BY_CODE) == len(own) == 15
    assert all(BY_CODE[kind.code] is kind for kind in own)


@pytest.mark.parametrize(("kind", "built_in"), BUILT_INS.items())
def test_luthier_error_is_caught_as_its_built_in(kind: type[LuthierError], built_in: type[Exception]) -> None:
    with pytest.raises(built_in, match="no such thing") as caught:
        raise kind("no such thing")
    assert isinstance(caught.value, LuthierError)
    assert caught.value.reason == kind.default_reason


def test_metadata_is_a_snapshot_that_cannot_be_changed() -> None:
    given = {"rank": "0"}
    error = InvalidArgument("m", metadata=given)
    given["rank"] = "1"
    assert error.metadata == {"rank": "0"}
    with pytest.raises(TypeError):
        error.metadata["rank"] = "2"  # type: ignore[index]


def test_of_fields_takes_reason_and_message_from_the_violations() -> None:
    error = InvalidArgument.of_fields(
        FieldViolation(field="spec.rank", description="must be set", reason=Reason.FIELD_REQUIRED),
        FieldViolation(field="spec.alpha", description="must be positive, got -1"),
    )
    assert error.reason == Reason.FIELD_REQUIRED
    assert str(error) == "spec.rank: must be set; spec.alpha: must be positive, got -1"
    assert [violation.field for violation in error.violations] == ["spec.rank", "spec.alpha"]


def test_reasons_are_their_own_names() -> None:
    assert all(reason.name == reason.value and len(reason) <= 63 for reason in Reason)


def test_package_imports_the_standard_library_only() -> None:
    code = (
        "import sys, luthier.errors; "
        "allowed = sys.stdlib_module_names | {'luthier', '__main__'}; "
        "print([m for m, v in sys.modules.items() if m.partition('.')[0] not in allowed "
        "and 'editable' not in m and getattr(v, '__file__', None)])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
