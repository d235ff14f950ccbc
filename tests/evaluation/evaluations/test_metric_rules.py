"""Which metrics are taken where nobody chose any, and which are refused before anything is queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.memory_peers import BASE, OTHER, VERSION

from luthier.errors import InvalidArgument, Reason
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_TRAIN, DatasetFormat, DatasetSource, Split
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, EvaluationMetric
from luthier.v1.model_pb2 import Taught
from luthier.work.tasks import TaskKind

PAIRS, OPENAI_PAIRS, SHAREGPT_PAIRS = "PREFERENCE", "PREFERENCE_OPENAI", "SHAREGPT_PREFERENCE"
TWO_BASES = [EvaluationArm(arm_id="zero", model=BASE), EvaluationArm(arm_id="far", model=OTHER)]


def source(
    format_name: str, split: Split.ValueType = SPLIT_TEST, *, is_detected: bool = True
) -> DatasetSource:
    found = DatasetFormat.Value(f"DATASET_FORMAT_{format_name}")
    return DatasetSource(split=split, detected_format=found) if is_detected else DatasetSource(format=found)


def metric(name: str) -> EvaluationMetric.ValueType:
    return EvaluationMetric.Value(f"EVALUATION_METRIC_{name}")


def named(made: Evaluation) -> list[str]:
    return [EvaluationMetric.Name(one).removeprefix("EVALUATION_METRIC_") for one in made.metrics]


@pytest.mark.parametrize(
    "sources",
    [
        [source(PAIRS)],
        [source(OPENAI_PAIRS), source(SHAREGPT_PAIRS)],
        [source(PAIRS, is_detected=False)],
        [source(PAIRS), source("OPENAI_CHAT", SPLIT_TRAIN)],
    ],
    ids=["one file", "two formats of pairs", "format was given", "only the other split has no pairs"],
)
async def test_of_pairs_the_first_metric_is_preference_and_the_verdict_is_about_it(
    bench: Bench, sources: Sequence[DatasetSource]
) -> None:
    bench.peers.sources.extend(sources)
    made = await bench.create()
    assert named(made) == ["PREFERENCE", "EXACT_MATCH", "PERPLEXITY"]
    assert made.primary_score == "preference.accuracy"
    _, spec = await bench.claim()
    assert spec.evaluate.evaluation.metrics == made.metrics, "the worker is told of them"


@pytest.mark.parametrize(
    "sources",
    [
        [],
        [source("OPENAI_CHAT")],
        [source(PAIRS), source("ALPACA")],
        [source(PAIRS), source("UNSPECIFIED")],
        [source(PAIRS, SPLIT_TRAIN), source("OPENAI_CHAT")],
    ],
    ids=["nothing known", "no pairs", "some are none", "one is not known", "pairs of the other split"],
)
async def test_where_not_all_records_are_known_to_be_pairs_preference_is_no_default(
    bench: Bench, sources: Sequence[DatasetSource]
) -> None:
    bench.peers.sources.extend(sources)
    made = await bench.create()
    assert named(made) == ["EXACT_MATCH", "PERPLEXITY"]
    assert made.primary_score == "exact_match"


@pytest.mark.parametrize(
    ("digests", "likelihood"),
    [
        ({}, "BITS_PER_BYTE"),
        ({BASE: "one", OTHER: "two"}, "BITS_PER_BYTE"),
        ({BASE: "one"}, "BITS_PER_BYTE"),
        ({BASE: "one", OTHER: "one"}, "PERPLEXITY"),
    ],
)
async def test_across_tokenizers_bits_per_byte_stand_in_the_place_of_perplexity(
    bench: Bench, digests: Mapping[str, str], likelihood: str
) -> None:
    bench.peers.taught.update({name: Taught(tokenizer_digest=digest) for name, digest in digests.items()})
    assert named(await bench.create(arms=TWO_BASES)) == ["EXACT_MATCH", likelihood]


async def test_of_pairs_across_tokenizers_both_hold(bench: Bench) -> None:
    bench.peers.sources.append(source(PAIRS))
    assert named(await bench.create(arms=TWO_BASES)) == ["PREFERENCE", "EXACT_MATCH", "BITS_PER_BYTE"]


async def test_what_was_chosen_stays(bench: Bench) -> None:
    bench.peers.sources.append(source(PAIRS))
    made = await bench.create(metrics=[metric("CHRF")], arms=TWO_BASES)
    assert (named(made), made.primary_score) == (["CHRF"], "chrf")


async def test_a_chosen_score_stays_beside_metrics_that_nobody_chose(bench: Bench) -> None:
    bench.peers.sources.append(source(PAIRS))
    made = await bench.create(primary_score="perplexity")
    assert (named(made)[0], made.primary_score) == ("PREFERENCE", "perplexity")


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ([source("OPENAI_CHAT")], "OPENAI_CHAT"),
        ([source(PAIRS), source("ALPACA")], "ALPACA"),
        ([source("SHAREGPT"), source("ALPACA", is_detected=False)], "ALPACA, SHAREGPT"),
        ([source("UNPAIRED")], "UNPAIRED"),
    ],
)
async def test_preference_of_files_that_are_no_pairs_is_refused_before_a_worker_is_asked(
    bench: Bench, sources: Sequence[DatasetSource], found: str
) -> None:
    bench.peers.sources.extend(sources)
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(metrics=[metric("EXACT_MATCH"), metric("PREFERENCE")])
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("evaluation.metrics", Reason.METRIC_NOT_MEASURED)
    assert violation.description == (
        "must not have PREFERENCE, which compares the two answers of preference pairs: "
        f"{VERSION} has records of {found}"
    )
    assert await bench.queue.claim("w@1", [TaskKind.EVALUATE], 0.0) is None, "nothing was queued"


@pytest.mark.parametrize("sources", [[], [source(PAIRS)], [source(PAIRS), source("UNSPECIFIED")]])
async def test_preference_of_pairs_and_of_files_that_nobody_looked_at_is_queued(
    bench: Bench, sources: Sequence[DatasetSource]
) -> None:
    bench.peers.sources.extend(sources)
    made = await bench.create(metrics=[metric("PREFERENCE")])
    assert (named(made), made.primary_score) == (["PREFERENCE"], "preference.accuracy")
