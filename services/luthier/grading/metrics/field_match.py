"""Field match: prediction and reference read as JSON objects and compared field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from luthier.grading.metrics.text_form import in_text_form

_MAX_DEPTH = 100
_RELATIVE_TOLERANCE = 1e-9


def field_match(prediction: str, reference: str) -> dict[str, float]:
    """Score a prediction against a reference, both JSON objects.

    Two values are equal when they are numbers of the same size (12.5 and 12.50, 3 and 3.0), strings equal in one
    Unicode form but for white space at both ends, both null, or equal lists or objects. A boolean is no number. A
    missing field equals nothing, not even null. Names of fields are compared in the same form, and in a prediction
    that has two of one name the last counts. A prediction that is no JSON object has every field wrong.

    Returns:
        `field_match.fields`: share of the reference's fields that are right;
        `field_match.record`: 1.0 when all are right and there is no other field;
        `field_match.parsed`: 1.0 when the prediction is a JSON object;
        `field_match.field.NAME`: 1.0 when the field NAME (in `TEXT_FORM`) of the reference is right.

    Raises:
        ValueError: the reference is no JSON object, or an empty one.
    """
    wanted = read_object(reference)
    if not wanted:
        raise ValueError(f"the reference must be a JSON object with a field, got {reference[:200]!r}")
    found = read_object(prediction)
    right = {name: found is not None and name in found and same(found[name], wanted[name]) for name in wanted}
    whole = all(right.values()) and found is not None and found.keys() == wanted.keys()
    scores = {f"field_match.field.{name}": float(is_right) for name, is_right in right.items()}
    scores["field_match.fields"] = sum(right.values()) / len(right)
    scores["field_match.record"] = float(whole)
    scores["field_match.parsed"] = float(found is not None)
    return scores


def read_object(text: str) -> Mapping[str, Any] | None:
    """Read a text as a JSON object, its strings in `TEXT_FORM`; None when it is something else or too deep."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or _is_deep(value):
        return None
    return {in_text_form(name): _in_form(inner) for name, inner in value.items()}


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for some in children for child in some if isinstance(child, dict | list)]
    return bool(level)


def _in_form(value: Any) -> Any:
    if isinstance(value, str):
        return in_text_form(value)
    if isinstance(value, list):
        return [_in_form(item) for item in value]
    if isinstance(value, dict):
        return {in_text_form(name): _in_form(inner) for name, inner in value.items()}
    return value


def same(left: Any, right: Any) -> bool:
    """Tell whether two JSON values, strings in `TEXT_FORM`, mean the same."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return _same_number(left, right)
    if isinstance(left, str) and isinstance(right, str):
        return left.strip() == right.strip()
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left is None and right is None


def _same_number(left: float, right: float) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    try:
        return math.isclose(left, right, rel_tol=_RELATIVE_TOLERANCE)
    except OverflowError:  # an integer beyond the range of float
        return left == right
