"""What tells two bodies of one request id apart."""

from __future__ import annotations

import hashlib
import uuid

import pytest
from google.protobuf.json_format import MessageToJson
from tests.runtime.conftest import SERVICE, Create, Site
from tests.runtime.test_server import refusal

from luthier.runtime.idempotency import fingerprint
from luthier.v1 import dataset_pb2, training_service_pb2


def test_the_request_id_and_the_order_of_maps_do_not_count() -> None:
    one = Create(parent="projects/p", request_id=str(uuid.uuid4()))
    two = Create(parent="projects/p", request_id=str(uuid.uuid4()))
    for key in ("a", "b", "c"):
        one.dataset.labels[key] = key
    for key in ("c", "a", "b"):
        two.dataset.labels[key] = key
    assert fingerprint(one) == fingerprint(two)
    two.dataset.labels["a"] = "other"
    assert fingerprint(one) != fingerprint(two)


def test_what_json_cannot_write_has_a_fingerprint() -> None:
    request = training_service_pb2.CreateFineTuningJobRequest()
    request.fine_tuning_job.create_time.seconds = 1 << 60
    request.fine_tuning_job.error.details.add(type_url="no/such.Type", value=b"\xff")
    with pytest.raises((TypeError, ValueError)):
        MessageToJson(request)
    assert fingerprint(request).startswith("b1:")


async def test_an_answer_that_an_earlier_version_kept_is_still_given(site: Site) -> None:
    """Until this version a fingerprint was the digest of the request's JSON."""
    request = Create(parent="projects/p", request_id=str(uuid.uuid4()))
    body = Create(parent="projects/p")
    json = MessageToJson(body, sort_keys=True, indent=None, ensure_ascii=True)
    digest = hashlib.sha256(site.keys.api_key.encode()).hexdigest()[:12]
    kept = dataset_pb2.Dataset(uid="kept").SerializeToString()
    key = (f"key:{digest}", f"/{SERVICE}/Create", request.request_id)
    site.log.rows[key] = (hashlib.sha256(json.encode()).hexdigest(), kept)
    assert (await site.create(request)).uid == "kept"
    request.dataset_id = "other"
    _, details = await refusal(site.create(request))
    assert details["ErrorInfo"].reason == "REQUEST_ID_REUSED"
    assert site.echo.calls == 0
