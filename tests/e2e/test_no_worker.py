"""What is asked of a service whose worker is not there."""

from __future__ import annotations

import pytest
from tests.e2e.conftest import Shared

from luthier.client import RetryPolicy
from luthier.errors import Unavailable
from luthier.v1.chat_pb2 import ChatMessage

pytestmark = pytest.mark.e2e


def test_generation_without_a_worker_is_unavailable(tuning: Shared) -> None:
    """The client asks again for a while: a worker may be about to start."""
    soon = RetryPolicy(deadline_seconds=2.0)
    with tuning.cluster.client(retry=soon) as client, pytest.raises(Unavailable) as caught:
        list(client.generate("tiny", [ChatMessage(role="user", content="hi")], max_new_tokens=4))
    assert caught.value.reason == "NO_WORKER"
