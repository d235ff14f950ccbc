"""Store evaluations as messages keyed by uid, and what belongs to one by that uid."""

from collections.abc import Mapping
from typing import Any

from alembic import op
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.engine import RowMapping

from luthier.storage.json_rows import NewRow, move, status
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, PredictionFile
from luthier.v1.dataset_pb2 import Split
from luthier.v1.evaluation_pb2 import (
    ArmResult,
    ArmTemplate,
    Comparison,
    Evaluation,
    EvaluationArm,
    EvaluationMetric,
    ScoreDirection,
    ScoreEstimate,
    ScoreKind,
    TemplateSource,
    TextForm,
    Verdict,
)
from luthier.v1.event_pb2 import Progress
from luthier.worker.v1.task_pb2 import Asking, PrefixTokens

revision = "evaluation_0004"
down_revision = "evaluation_0003"
branch_labels = None
depends_on = None

_OWNED = ("predictions", "answer_files")
"""The tables of what belongs to an evaluation."""
_SCORES = {
    "exact_match": ("BINARY", True),
    "field_match.fields": ("FRACTION", True),
    "field_match.record": ("BINARY", True),
    "field_match.parsed": ("BINARY", True),
    "perplexity": ("REAL", False),
}
"""Kind of a score, and whether more is better: what results are that are older than these fields."""
_FIELD_SCORES = "field_match.field."
_WHOLE_ANSWER = ("exact_match", "field_match.record")
"""Scores that say of each answer that the whole of it is right."""


def upgrade() -> None:
    """Move every row; what belongs to an evaluation that is gone goes."""
    move("evaluations", ["state"], _evaluation)
    for table in _OWNED:
        op.execute(f"DELETE FROM {table} WHERE evaluation NOT IN (SELECT name FROM evaluations)")
        uid = f"SELECT uid FROM evaluations WHERE evaluations.name = {table}.evaluation"
        op.execute(f"UPDATE {table} SET evaluation = ({uid})")
        op.execute(f"ALTER TABLE {table} RENAME COLUMN evaluation TO owner")


def downgrade() -> None:
    """Refuse: what was written since cannot become JSON again."""
    raise NotImplementedError("rows of messages cannot become JSON again; restore a backup")


def _evaluation(row: RowMapping) -> NewRow:
    body = row["body"]
    message = Evaluation(
        display_name=body.get("display_name", ""),
        dataset_version=body["dataset_version"],
        split=_enum(Split, "SPLIT_", body.get("split", "TEST")),
        max_records=body.get("max_records", 0),
        seed=body.get("seed", 0),
        arms=[_arm(one) for one in body["arms"]],
        metrics=[
            _enum(EvaluationMetric, "EVALUATION_METRIC_", one) for one in body.get("metrics", ["EXACT_MATCH"])
        ],
        max_new_tokens=body.get("max_new_tokens", 256),
        arm_results=[_arm_result(one) for one in body.get("arm_results", ())],
        comparisons=[_comparison(one) for one in body.get("comparisons", ())],
        num_records=body.get("num_records", 0),
        dataset_digest=body.get("dataset_digest", ""),
        model_digests=body.get("model_digests", {}),
        error=status(body["failure"]) if body.get("failure") else None,
        warnings=body.get("warnings", ()),
    )
    if body.get("end_time"):
        ended = Timestamp()
        ended.FromJsonString(body["end_time"])
        message.end_time.CopyFrom(ended)
    askings = body.get("askings") or {}
    private = EvaluationPrivate(
        base_model=body.get("base_model", ""),
        askings=[_asking(askings[arm["arm_id"]]) for arm in body["arms"]] if askings else (),
        predictions=PredictionFile(**body["predictions"]) if body.get("predictions") else None,
    )
    progress = Evaluation(progress=Progress(**body["progress"])) if body.get("progress") else None
    return NewRow(message=message, private=private, progress=progress)


def _arm(stored: Mapping[str, Any]) -> EvaluationArm:
    template = _enum(ArmTemplate, "ARM_TEMPLATE_", stored.get("template"))
    return EvaluationArm(**{**stored, "template": template})


def _asking(stored: Mapping[str, Any]) -> Asking:
    prefix = stored.get("prefix_token_ids")
    return Asking(
        template_source=_enum(TemplateSource, "TEMPLATE_SOURCE_", stored.get("source", "BASE")),
        chat_template=stored.get("chat_template", ""),
        template_date=stored.get("template_date", ""),
        prefix=PrefixTokens(token_ids=prefix) if prefix is not None else None,
        stop_token_ids=stored.get("stop_token_ids", ()),
        eos_token_ids=stored.get("eos_token_ids", ()),
        old_prefix=stored.get("old_prefix", False),
    )


def _arm_result(stored: Mapping[str, Any]) -> ArmResult:
    changed = {
        "scores": [_score(one) for one in stored["scores"]],
        "template_source": _enum(TemplateSource, "TEMPLATE_SOURCE_", stored.get("template_source")),
    }
    return ArmResult(**{**stored, **changed})


def _score(stored: Mapping[str, Any]) -> ScoreEstimate:
    filled = {**_with_meaning(stored), "text_form": _enum(TextForm, "TEXT_FORM_", stored.get("text_form"))}
    return ScoreEstimate(**filled)


def _comparison(stored: Mapping[str, Any]) -> Comparison:
    return Comparison(**{**_with_meaning(stored), "verdict": _enum(Verdict, "VERDICT_", stored["verdict"])})


def _with_meaning(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a result with kind and direction as messages have them."""
    kind, more_is_better = stored.get("kind"), stored.get("higher_is_better")
    if kind is None:
        score = stored["score"]
        own = ("BINARY", True) if score.startswith(_FIELD_SCORES) else (None, None)
        kind, more_is_better = _SCORES.get(score, own)
    direction = {None: "UNSPECIFIED", True: "HIGHER_IS_BETTER", False: "LOWER_IS_BETTER"}[more_is_better]
    filled = {
        **stored,
        "kind": _enum(ScoreKind, "SCORE_KIND_", kind),
        "direction": _enum(ScoreDirection, "SCORE_DIRECTION_", direction),
        "whole_answer": stored["score"] in _WHOLE_ANSWER,
    }
    filled.pop("higher_is_better", None)
    return filled


def _enum(wire: Any, prefix: str, name: str | None) -> Any:
    return wire.Value(prefix + (name or "UNSPECIFIED"))
