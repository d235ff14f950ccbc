"""Signatures as receivers verify them, by the library of the scheme itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from luthier.errors import FailedPrecondition, NotFound
from luthier.runtime.keys import read_or_create_key
from luthier.work.webhooks.signing import SECRET_FILE, SECRET_KIND, secrets_of, signed_headers

ORIGIN = "https://hooks.example.com:443"
BODY = b'{"type":"evaluation.succeeded"}'


def made(folder: Path) -> Path:
    path = folder / SECRET_FILE
    read_or_create_key(path, SECRET_KIND)
    return path


def test_the_schemes_own_library_believes_a_signature(tmp_path: Path) -> None:
    (secret,) = secrets_of(made(tmp_path), ORIGIN, "p")
    headers = signed_headers([secret], "msg_1", int(time.time()), BODY)
    assert Webhook(secret).verify(BODY, dict(headers)) == {"type": "evaluation.succeeded"}


@pytest.mark.parametrize("changed", ["webhook-id", "webhook-timestamp", "body"])
def test_nothing_that_is_signed_can_be_changed(tmp_path: Path, changed: str) -> None:
    (secret,) = secrets_of(made(tmp_path), ORIGIN, "p")
    now = int(time.time())
    headers = dict(signed_headers([secret], "msg_1", now, BODY))
    body = BODY
    if changed == "body":
        body += b" "
    else:
        headers[changed] = {"webhook-id": "msg_2", "webhook-timestamp": str(now - 1)}[changed]
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body, headers)


def test_the_example_of_the_scheme_has_its_signature() -> None:
    """Of the project's own tests."""
    headers = signed_headers(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "other", [("https://other.example:443", "p"), (ORIGIN, "q")], ids=["host", "project"]
)
def test_a_receiver_cannot_sign_what_another_one_believes(tmp_path: Path, other: tuple[str, str]) -> None:
    path = made(tmp_path)
    (ours,), (theirs,) = secrets_of(path, ORIGIN, "p"), secrets_of(path, *other)
    headers = signed_headers([theirs], "msg_1", int(time.time()), BODY)
    with pytest.raises(WebhookVerificationError):
        Webhook(ours).verify(BODY, dict(headers))


def test_while_there_are_two_secrets_both_sign(tmp_path: Path) -> None:
    """So that a receiver can take the new one at any time meanwhile."""
    path = made(tmp_path)
    (old,) = secrets_of(path, ORIGIN, "p")
    path.write_text(f"lh_{'n' * 24}\n" + path.read_text())
    new, still = secrets_of(path, ORIGIN, "p")
    assert still == old != new
    headers = dict(signed_headers([new, still], "msg_1", int(time.time()), BODY))
    for secret in (new, old):
        Webhook(secret).verify(BODY, headers)


def test_a_secret_that_others_may_read_signs_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        secrets_of(tmp_path / SECRET_FILE, ORIGIN, "p")
    path = made(tmp_path)
    path.chmod(0o644)
    with pytest.raises(FailedPrecondition, match="readable by its owner alone"):
        secrets_of(path, ORIGIN, "p")


def test_too_many_secrets_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(FailedPrecondition, match="at most 4 secrets, one a line, got 5"):
        secrets_of(path, ORIGIN, "p")


def test_a_secret_that_is_guessed_easily_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_text(path.read_text() + "x" * 23 + "\n")
    with pytest.raises(
        FailedPrecondition, match="at least 24 random characters, got 23 in secret 2"
    ) as caught:
        secrets_of(path, ORIGIN, "p")
    assert "xxx" not in str(caught.value)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(FailedPrecondition, match="webhook-secret must be a file of text"):
        secrets_of(path, ORIGIN, "p")
    aside = path.rename(tmp_path / "aside")
    path.symlink_to(aside)
    with pytest.raises(FailedPrecondition, match=r"webhook-secret must be a file of text .* symbolic link"):
        secrets_of(path, ORIGIN, "p")
