"""What is asked of a service whose worker is not there."""

from __future__ import annotations

import pytest
from tests.e2e.conftest import Shared

from luthier.errors import Unavailable
from luthier.v1.chat_pb2 import ChatMessage

pytestmark = pytest.mark.e2e


def test_generation_without_a_worker_is_unavailable(tuning: Shared) -> None:
    with tuning.cluster.client() as client, pytest.raises(Unavailable) as caught:
        list(client.generate("tiny", [ChatMessage(role="user", content="hi")], max_new_tokens=4))
    assert caught.value.reason == "NO_WORKER"
