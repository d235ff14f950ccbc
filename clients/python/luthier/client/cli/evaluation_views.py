"""How evaluations look on a terminal: the verdict first, then scores, comparisons and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from luthier.client.askings import asked_with, bases_below, shots_words, system_prompts
from luthier.client.cli.grades import add_grades, grader_table
from luthier.client.cli.judging import add_judgements, judge_table, pair_lines
from luthier.client.cli.views import facts, failure, split_name, state, table, waiting, when
from luthier.client.drift import divergence_words, retained_words, skill_words, text_loss_words
from luthier.client.names import short
from luthier.client.scores import (
    difference_words,
    estimate_words,
    is_right,
    lower_is_better,
    pairs_words,
    rows_apart,
    scores_of,
    text_form_words,
    verdict_word,
)
from luthier.client.verdicts import confidence_words, outcome_class, outcome_word, p_value_words
from luthier.v1.verdict_pb2 import GuardResult

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.client.disagreements import Disagreement
    from luthier.v1.evaluation_pb2 import ArmPrediction, Comparison, Evaluation, Prediction

_VERDICT_STYLES = {"better": "bold green", "worse": "bold red"}
_GUARD_STYLES = {"held": "green", "broken": "bold red"}
_SIDE_STYLES = {"gained": "green", "lost": "red"}


def evaluation_table(evaluations: Iterable[Evaluation]) -> Table:
    """Return evaluations, a row each."""
    made = table("NAME", "STATE", "VERSION", "ARMS", "#RECORDS", "VERDICT", "CREATED (UTC)")
    for evaluation in evaluations:
        made.add_row(
            short(evaluation.name),
            state(evaluation),
            short(evaluation.dataset_version),
            ", ".join(arm.arm_id for arm in evaluation.arms),
            str(evaluation.num_records or ""),
            outcome_text(evaluation),
            when(evaluation.create_time),
        )
    return made


def outcome_text(evaluation: Evaluation) -> Text:
    """Return what an evaluation shows, coloured; empty where it has no verdict."""
    style = _VERDICT_STYLES.get(outcome_class(evaluation.verdict), "yellow")
    return Text(outcome_word(evaluation.verdict), style)


def verdict_parts(evaluation: Evaluation) -> Iterator[Text]:
    """Yield the verdict's sentence, and one for each guard."""
    if not evaluation.HasField("verdict"):
        return
    style = _VERDICT_STYLES.get(outcome_class(evaluation.verdict), "bold yellow")
    yield Text(evaluation.verdict.sentence, style)
    for result in evaluation.verdict.guards:
        standing = GuardResult.Standing.Name(result.standing).removeprefix("STANDING_").lower()
        yield Text(f"guard {standing}: {result.sentence}", _GUARD_STYLES.get(standing, "yellow"))


def evaluation_facts(evaluation: Evaluation) -> Group:
    """Return an evaluation: its verdict, what it is, scores and comparisons."""
    head = facts(
        [
            ("evaluation", short(evaluation.name)),
            ("state", state(evaluation)),
            ("failure", failure(evaluation)),
            ("waiting", waiting(evaluation)),
            ("version", f"{short(evaluation.dataset_version)} {split_name(evaluation.split)}"),
            ("records", evaluation.num_records),
            ("text compared in", text_form_words(evaluation)),
            ("arms", ", ".join(f"{a.arm_id}={short(a.model)}:{shots_words(a)}" for a in evaluation.arms)),
            *((f"below {arm_id}", short(base)) for arm_id, base in bases_below(evaluation).items()),
            *((f"system prompt of {arm_id}", text) for arm_id, text in system_prompts(evaluation).items()),
        ]
    )
    asked = [(f"asked {result.arm_id}", asked_with(result)) for result in evaluation.arm_results]
    parts: list[Any] = [
        *verdict_parts(evaluation),
        head,
        *(Text(f"warning: {warning}", "yellow") for warning in evaluation.warnings),
    ]
    if any(words for _, words in asked):
        parts.append(facts(asked))
    for made in (
        _score_table(evaluation),
        _drift_table(evaluation),
        grader_table(evaluation),
        judge_table(evaluation),
        comparison_table(evaluation.comparisons),
    ):
        if made.row_count:
            parts += [Text(""), made]
    parts += pair_lines(evaluation)
    return Group(*parts)


def _score_table(evaluation: Evaluation) -> Table:
    """A row for each score, a column for each arm: estimate and 95 % interval."""
    made = table("SCORE", *(f"#{result.arm_id}" for result in evaluation.arm_results))
    for score in scores_of(evaluation):
        found = [
            next((entry for entry in result.scores if entry.score == score), None)
            for result in evaluation.arm_results
        ]
        better = " (lower is better)" if any(entry and lower_is_better(entry) for entry in found) else ""
        made.add_row(f"{score}{better}", *(estimate_words(entry) if entry else "" for entry in found))
    for words, entries in rows_apart(evaluation):
        made.add_row(words, *(estimate_words(entry) if entry else "" for entry in entries))
    if any(result.tokens_per_second for result in evaluation.arm_results):
        speeds = (f"{result.tokens_per_second:.1f}" for result in evaluation.arm_results)
        made.add_row("tokens drawn each second", *speeds)
    if any(result.num_errors for result in evaluation.arm_results):
        made.add_row(
            "records without an answer", *(str(result.num_errors) for result in evaluation.arm_results)
        )
    return made


def _drift_table(evaluation: Evaluation) -> Table:
    """A row for each tuned arm: what it retains of general abilities, of each skill, and how far it has moved."""
    skills = list(dict.fromkeys(skill for one in evaluation.drift_results for skill, _ in skill_words(one)))
    made = table(
        "DRIFT OF", "FROM", "#RETAINED", *(f"#{skill.upper()}" for skill in skills), "#DIVERGENCE", "#TEXT"
    )
    for one in evaluation.drift_results:
        words = dict(skill_words(one))
        cells = (words.get(skill, "") for skill in skills)
        made.add_row(
            one.arm_id,
            one.baseline_arm_id,
            retained_words(one),
            *cells,
            divergence_words(one),
            text_loss_words(one),
        )
    return made


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """Return comparisons, a row each; P is corrected for how many there are, and CONFIDENCE is the interval's."""
    made = table("SCORE", "COMPARED", "#DIFFERENCE", "#CONFIDENCE", "#P", "#PAIRS", "VERDICT")
    for entry in comparisons:
        word = verdict_word(entry.verdict)
        made.add_row(
            entry.score,
            f"{entry.candidate_arm_id} - {entry.baseline_arm_id}",
            difference_words(entry),
            confidence_words(entry),
            p_value_words(entry),
            pairs_words(entry),
            Text(word, _VERDICT_STYLES.get(word, "yellow")),
        )
    return made


def prediction_table(predictions: Iterable[Prediction]) -> Table:
    """Return what each arm answered, record by record, beside the right answer."""
    made = table("#ROW", "WHO", "", "ANSWER")
    for prediction in predictions:
        _add_question(made, prediction, "")
        for answer in prediction.answers:
            _add_answer(made, prediction, answer)
        add_judgements(made, prediction)
    return made


def disagreement_table(found: Iterable[Disagreement]) -> Table:
    """Return the records on which two arms disagree, and who has which of them."""
    made = table("#ROW", "WHO", "", "ANSWER")
    for one in found:
        _add_question(made, one.prediction, one.side)
        for answer in (one.baseline, one.candidate):
            _add_answer(made, one.prediction, answer)
    return made


def _add_question(made: Table, prediction: Prediction, side: str) -> None:
    question = prediction.prompt[-1].content if prediction.prompt else ""
    made.add_row(
        str(prediction.row), "question", Text(side, _SIDE_STYLES.get(side, "")), Text(question, "dim")
    )
    made.add_row("", "reference", "", prediction.reference)


def _add_answer(made: Table, prediction: Prediction, answer: ArmPrediction) -> None:
    if answer.HasField("error"):
        why = f"{prediction.filename}:{prediction.line}: {answer.error.message}"
        made.add_row("", answer.arm_id, Text("!", "red"), Text(why, "red"))
        return
    right = is_right(answer)
    mark = Text("") if right is None else Text("\u2713", "green") if right else Text("\u2717", "red")
    made.add_row("", answer.arm_id, mark, answer.text)
    add_grades(made, answer)
