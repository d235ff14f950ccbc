"""Orders to render records that are given."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.data.worker.building import VersionBuilder
from luthier.data.worker.record_rendering import RecordSettings
from luthier.data.worker.splitting import Place
from luthier.data.worker.version_rendering import RenderOrder
from luthier.v1.dataset_pb2 import DATASET_FORMAT_UNSPECIFIED, SPLIT_TRAIN, Split, SplitSettings
from luthier.v1.rendering_pb2 import TemplateErrorPolicy
from luthier.worker.v1.task_pb2 import RenderSpec

Ordered = Callable[..., RenderOrder]


@pytest.fixture
def ordered(tmp_path: Path, bundle_folder: Path) -> Ordered:
    """Makes an order that renders the records given: conversations in a.jsonl, and plain ones in b.jsonl."""

    def order(*records: object, split: Split.ValueType = SPLIT_TRAIN, **changes: Any) -> RenderOrder:
        folder = tmp_path / f"order-{len(list(tmp_path.iterdir()))}"
        for name in ("version", "rows"):
            (folder / name).mkdir(parents=True)
        builder = VersionBuilder(folder / "version", SplitSettings(), lambda: None, [split])
        chats = [record for record in records if isinstance(record, dict) and "messages" in record]
        plain = [record for record in records if record not in chats]
        for name, kind in (("a.jsonl", chats), ("b.jsonl", plain)):
            data = b"".join(json.dumps(record).encode() + b"\n" for record in kind)
            if data:
                builder.read(io.BytesIO(data), Place(filename=name, split=split), DATASET_FORMAT_UNSPECIFIED)
        settings = RecordSettings(
            bundle_folder=str(bundle_folder),
            chat_template="",
            mask_mode="",
            max_tokens=512,
            length_policy="DROP",
            template_date="2026-11-23",
            split_turns=False,
            kind="SUPERVISED",
        )
        policy = changes.pop("template_error_policy", TemplateErrorPolicy.TEMPLATE_ERROR_POLICY_STRICT)
        return RenderOrder(
            spec=RenderSpec(dataset_digest="d", tokenizer_digest="t", template_error_policy=policy),
            shards=tuple(str(shard.path) for shard in builder.finish().shards),
            output_folder=str(folder / "rows"),
            records=replace(settings, **changes),
        )

    return order
