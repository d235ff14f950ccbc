"""A model of ours in lm-evaluation-harness (extra `lm-eval`), and its results as our messages.

`LuthierLM` is the harness's `LM`: it asks over the public API, so that whoever runs tasks needs neither torch nor
weights. `import luthier.client.harness` makes the harness know it by the name `luthier`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from luthier.client.clients import Client
from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import (
    SCORE_DIRECTION_HIGHER_IS_BETTER,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_FRACTION,
    SCORE_KIND_REAL,
    ArmResult,
    ScoreEstimate,
)
from luthier.v1.text_score_pb2 import TextScore, TextToScore

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise FailedPrecondition(
        "running tasks of lm-evaluation-harness needs it: pip install 'luthier-client[lm-eval]'"
    ) from error

T = TypeVar("T")
R = TypeVar("R")
_TEXTS_A_CALL = 16
_CHARACTERS_A_CALL = 1 << 15
"""What a slow processor scores well within the client's deadline."""
_CALLS_AT_ONCE = 4
_DEFAULT_NEW_TOKENS = 256
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN_ARGUMENTS = ("until", "do_sample", "temperature", "top_p", "seed", *_TOKEN_LIMITS)
_NORMAL_95 = 1.959963984540054
_SHARES = ("acc", "exact_match")
"""What metrics of the harness begin with whose values are shares from 0 to 1: others may run to 100, or below 0."""


@register_model("luthier")
class LuthierLM(LM):  # type: ignore[misc] # lm_eval has no types
    """A model, a checkpoint or an alias of ours as the harness asks it.

    Tokens are cut as the harness's own backends cut them. With `apply_chat_template` turns go through the template that
    the model was taught with, for tasks that generate.

    Args:
        model: its name; a short one will do.
        client: asks; None: one of its own, as the environment says.
        others: what the harness passes to every model (batch size, device), which is the worker's to choose.
    """

    def __init__(self, model: str, client: Client | None = None, **others: object) -> None:
        super().__init__()
        del others
        self._model = model
        self._client = client or Client()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one.

        Raises InvalidArgument for turns: likelihoods are of texts.
        """
        texts = [_pair(*request.args) for request in requests]
        found = [(score.log_probability, score.is_greedy) for score in self._scores(texts)]
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-probability of each whole text, in windows where it is longer than the model reads."""
        texts = [TextToScore(continuation=text, rolling=True) for (text,) in (one.args for one in requests)]
        found = [score.log_probability for score in self._scores(texts)]
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return an answer to each context, cut before the first of its stops.

        Raises InvalidArgument for arguments of generation that are none of ours.
        """
        found = self._together(lambda request: self._answer(*request.args), requests)
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, one)
        return found

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], **how: object) -> str:
        """Return turns as a text that `generate_until` knows again: the template is applied by the worker.

        Raises InvalidArgument where the last turn is not to be answered but gone on with.
        """
        if how.get("add_generation_prompt") is False:
            raise InvalidArgument(
                "the last turn must be the user's: no model of ours goes on with its own turn"
            )
        return _TURNS + json.dumps([{key: turn[key] for key in ("role", "content")} for turn in chat_history])

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells requests of different templates apart by."""
        return f"luthier/{self._model}"

    def _scores(self, texts: Sequence[TextToScore]) -> list[TextScore]:
        parts = list(_parts(texts))
        found = self._together(lambda part: self._client.evaluations.score_texts(self._model, part), parts)
        return [score for response in found for score in response.scores]

    def _answer(self, context: str, arguments: Mapping[str, Any]) -> str:
        if unknown := sorted(arguments.keys() - set(_KNOWN_ARGUMENTS)):
            raise InvalidArgument(
                f"generation_kwargs must be some of {', '.join(_KNOWN_ARGUMENTS)}, got {', '.join(unknown)}"
            )
        stops = _stops(arguments.get("until"))
        limits = [int(arguments[name]) for name in _TOKEN_LIMITS if arguments.get(name)]
        is_drawn = arguments.get("do_sample", float(arguments.get("temperature") or 0) > 0)
        pieces = self._client.generate(
            self._model,
            _prompt(context),
            max_new_tokens=limits[0] if limits else _DEFAULT_NEW_TOKENS,
            temperature=float(arguments.get("temperature") or 1.0) if is_drawn else 0.0,
            top_p=float(arguments.get("top_p") or 0.0),
            seed=int(arguments.get("seed") or 0),
        )
        text = ""
        with closing(pieces):
            for piece in pieces:
                text += piece.text
                if any(stop in text for stop in stops):
                    break
        return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)

    def _together(self, ask: Callable[[T], R], wanted: Sequence[T]) -> list[R]:
        with ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix="harness") as threads:
            return list(threads.map(ask, wanted))


_TURNS = "luthier-turns:"


def run_tasks(
    model: LM,
    tasks: Sequence[str],
    *,
    folders: Sequence[Path] = (),
    limit: int = 0,
    num_shots: int | None = None,
    chat: bool = False,
) -> Mapping[str, Any]:
    """Run tasks of the harness, by name or as files, and return its own results.

    Args:
        model: `LuthierLM`, or any other `LM`.
        tasks: names of tasks, those of `folders` before the harness's own, or paths of YAML files.
        folders: where tasks of yours are.
        limit: records of each task at most; 0: all.
        num_shots: examples before each question; None: as each task says.
        chat: whether questions are put in turns.

    Raises InvalidArgument where there is no such task.
    """
    # To read the names of the harness's own tasks, thousands of files, takes it half a minute.
    manager = _manager(folders, own=False)
    if _unknown(manager, tasks):
        manager = _manager(folders, own=True)
    if unknown := _unknown(manager, tasks):
        raise InvalidArgument(
            f"tasks must be names that the harness or {', '.join(map(str, folders)) or 'no folder'} has, or files, got "
            f"{', '.join(unknown)}"
        )
    results: Mapping[str, Any] = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit or None,
        num_fewshot=num_shots,
        apply_chat_template=chat,
        log_samples=False,
        torch_random_seed=None,
    )
    return results


def _manager(folders: Sequence[Path], *, own: bool) -> TaskManager:
    return TaskManager(include_path=[str(folder) for folder in folders] or None, include_defaults=own)


def _unknown(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    known = set(manager.all_tasks)
    return [task for task in tasks if task not in known and not Path(task).is_file()]


def arm_result(arm_id: str, results: Mapping[str, Any]) -> ArmResult:
    """Return results of the harness as an arm's: a score `lm_eval.TASK.METRIC` for each metric, with a normal interval.

    A filter of the harness other than `none` stands behind the metric, `lm_eval.gsm8k.exact_match.strict-match`. Where
    the harness gives no standard error the bounds are unset.
    """
    return ArmResult(arm_id=arm_id, scores=_estimates(results))


def _estimates(results: Mapping[str, Any]) -> Iterator[ScoreEstimate]:
    for task, metrics in sorted(results["results"].items()):
        count = results["n-samples"].get(task, {}).get("effective", 0)
        for key, value in sorted(metrics.items()):
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            is_share = metric.startswith(_SHARES) and 0 <= value <= 1
            is_better = results["higher_is_better"].get(task, {}).get(metric)
            lower, upper = _bounds(value, metrics.get(f"{metric}_stderr,{name}"), is_share=is_share)
            yield ScoreEstimate(
                score=".".join(("lm_eval", task, metric, *([name] if name != "none" else []))),
                value=value,
                lower=lower,
                upper=upper,
                count=count,
                kind=SCORE_KIND_FRACTION if is_share else SCORE_KIND_REAL,
                direction=SCORE_DIRECTION_LOWER_IS_BETTER
                if is_better is False
                else SCORE_DIRECTION_HIGHER_IS_BETTER,
            )


def _bounds(value: float, error: object, *, is_share: bool) -> tuple[float, float]:
    """Return 0 for both where the harness knows no standard error: at the value they would claim that it is certain."""
    if not isinstance(error, int | float) or not math.isfinite(error):
        return 0.0, 0.0
    lower, upper = value - _NORMAL_95 * error, value + _NORMAL_95 * error
    return (max(lower, 0.0), min(upper, 1.0)) if is_share else (lower, upper)


def _pair(context: str, continuation: str) -> TextToScore:
    """White space at the end of a context is the continuation's, as in the harness: tokens begin with it."""
    if context.startswith(_TURNS):
        raise InvalidArgument(
            "questions in turns (apply_chat_template) must be of tasks that generate: a likelihood is of a text, and "
            f"templates are the worker's to apply; run this task without turns, got {context[:60]!r}"
        )
    kept = context.rstrip()
    return TextToScore(context=kept, continuation=context[len(kept) :] + continuation)


def _prompt(context: str) -> str | list[ChatMessage]:
    if not context.startswith(_TURNS):
        return context
    return [ChatMessage(**turn) for turn in json.loads(context.removeprefix(_TURNS))]


def _stops(until: str | Iterable[str] | None) -> list[str]:
    if until is None:
        return []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _parts(texts: Iterable[TextToScore]) -> Iterator[list[TextToScore]]:
    part: list[TextToScore] = []
    num_characters = 0
    for text in texts:
        length = len(text.context) + len(text.continuation)
        if part and (len(part) == _TEXTS_A_CALL or num_characters + length > _CHARACTERS_A_CALL):
            yield part
            part, num_characters = [], 0
        part.append(text)
        num_characters += length
    if part:
        yield part
