from luthier.errors import Failure, LuthierError, NotFound, Reason, ResourceExhausted


def test_failure_of_an_error_gives_the_same_class_back() -> None:
    error = NotFound("no base model m", reason=Reason.BASE_MODEL_MISSING, metadata={"model": "m"})
    failure = Failure.of(error)
    assert failure == Failure(
        code="NOT_FOUND", reason="BASE_MODEL_MISSING", message="no base model m", metadata={"model": "m"}
    )
    again = failure.to_error()
    assert type(again) is NotFound
    assert (again.reason, again.message, dict(again.metadata)) == (
        error.reason,
        error.message,
        {"model": "m"},
    )


def test_failure_with_a_code_of_a_newer_service_is_a_plain_luthier_error() -> None:
    failure = Failure(code="NOT_INVENTED", reason="NEW_REASON", message="m")
    assert type(failure.to_error()) is LuthierError
    assert failure.to_error().reason == "NEW_REASON"


def test_when_to_come_back_is_passed_on() -> None:
    error = ResourceExhausted("busy", retry_after_seconds=1.5)
    assert Failure.of(error).to_error().retry_after_seconds == 1.5
