"""What tuned arms have forgotten: a general suite put to a baseline and to them, and what they find of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.arm import ArmRunner, Manner
from luthier.evaluation.worker.drift_results import ArmRecords, Records, drift_of, drift_warnings
from luthier.evaluation.worker.drift_suite import Suite
from luthier.evaluation.worker.exact_drift import ExactDrift, chosen
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.questions import ask, no_shots
from luthier.grading.suite import general_texts
from luthier.text.rendering import Rendered
from luthier.v1.evaluation_pb2 import DriftResult, Evaluation
from luthier.work.context import TaskContext
from luthier.work.limited import Check
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What the baseline said itself, as tokens: its most likely answers, then those that were drawn."""

    tokens_digest: str
    references: Mapping[int, Rendered]


class Drift:
    """Asks arms a suite, the baseline before all others.

    Args:
        context: the task.
        answered: what is answered so far, of this too.
        evaluation: which measures drift.
        suite: what is asked.
        num_others: answers that the task has besides.
    """

    def __init__(
        self,
        context: TaskContext,
        answered: Answered,
        evaluation: Evaluation,
        suite: Suite,
        num_others: int,
    ) -> None:
        self._context = context
        self._answered = answered
        self._evaluation = evaluation
        self._baseline = evaluation.drift.baseline_arm_id
        self._suite, self._questions = suite, suite.questions
        arms = [arm.arm_id for arm in evaluation.arms if arm.tuned and arm.arm_id != self._baseline]
        self.arm_ids = frozenset((self._baseline, *arms))
        # The baseline is asked twice: for its most likely answers, and for some that are drawn.
        self.num_answers = len(self._questions) * (len(self.arm_ids) + 1)
        self._num_all = num_others + self.num_answers
        self._said: dict[str, Records] = {}
        self._found: dict[str, Records] = {}
        self._read: dict[str, Records] = {}
        self._own: _Own | None = None
        self._exact = ExactDrift(context, answered)
        self._compared: dict[str, Records] = {}

    def groups(self, groups: Iterable[list[task_pb2.ArmModel]]) -> list[list[task_pb2.ArmModel]]:
        """Return arms by base models, that of the baseline first: what it says is shown to all others."""
        return sorted(groups, key=lambda arms: all(arm.arm.arm_id != self._baseline for arm in arms))

    def of(self, arms: Iterable[task_pb2.ArmModel]) -> list[task_pb2.ArmModel]:
        """Return those arms that are asked, the baseline first."""
        wanted = [arm for arm in arms if arm.arm.arm_id in self.arm_ids]
        return sorted(wanted, key=lambda arm: arm.arm.arm_id != self._baseline)

    def ask(self, loaded: LoadedModel, arm: task_pb2.ArmModel, adapter: str | None) -> None:
        """Ask an arm the suite, and what it finds of the baseline's answers where its tokens are the same."""
        arm_id = arm.arm.arm_id
        is_baseline = arm_id == self._baseline
        texts = _texts(loaded, arm, self._context.check)
        likely = self._runner(loaded, arm, adapter, keeps_tokens=is_baseline)
        self._said[arm_id] = likely.run(_key(arm_id), self._questions, no_shots, self._rows).records
        if is_baseline:
            drawing = self._runner(loaded, arm, adapter, temperature=1.0, keeps_tokens=True)
            drawn = drawing.run(_key(arm_id, "drawn"), self._questions, no_shots, self._rows).records
            self._own = self._as_tokens(loaded, arm, drawn)
            self._keep_distributions(loaded, adapter, self._own)
        if self._own is not None and loaded.tokens_digest == self._own.tokens_digest:
            num_rows = 2 * len(self._questions)
            self._found[arm_id] = likely.measure(_key(arm_id, "found"), self._own.references, num_rows)
            if not is_baseline:
                self._compared[arm_id] = self._exact.compare(loaded, adapter, _key(arm_id, "exact"))
        self._read[arm_id] = likely.measure(_key(arm_id, "texts"), texts, len(texts))

    def _keep_distributions(self, loaded: LoadedModel, adapter: str | None, own: _Own) -> None:
        count = len(self._questions)
        drawn = {row: text for row, text in own.references.items() if row >= count}
        keys = [_key(arm_id, "exact") for arm_id in self.arm_ids if arm_id != self._baseline]
        self._exact.keep(loaded, adapter, chosen(drawn, self._evaluation.seed), keys)

    def results(self) -> list[DriftResult]:
        """Return how far each tuned arm has drifted, in the order of the arms."""
        baseline = self._records(self._baseline)
        return [
            drift_of(
                DriftResult(arm_id=arm.arm_id, baseline_arm_id=self._baseline),
                self._suite,
                self._records(arm.arm_id),
                baseline,
            )
            for arm in self._evaluation.arms
            if arm.arm_id in self.arm_ids and arm.arm_id != self._baseline
        ]

    def warnings(self) -> Iterator[str]:
        """Yield what keeps drift from being measured."""
        for arm_id in self._said:
            is_baseline = arm_id == self._baseline
            yield from drift_warnings(arm_id, self._records(arm_id), is_baseline=is_baseline)
        if self._own is not None and all(row < len(self._questions) for row in self._own.references):
            yield f"drift: arm {self._baseline} drew no answer that has tokens, so that there is no divergence"

    @property
    def _rows(self) -> range:
        return range(len(self._questions))

    def _runner(
        self,
        loaded: LoadedModel,
        arm: task_pb2.ArmModel,
        adapter: str | None,
        *,
        temperature: float = 0.0,
        keeps_tokens: bool = False,
    ) -> ArmRunner:
        manner = Manner(
            asking=_without_system_prompt(arm.asking),
            max_new_tokens=self._evaluation.drift.max_new_tokens,
            seed=self._evaluation.seed,
            temperature=temperature,
            keeps_tokens=keeps_tokens,
        )
        return ArmRunner(
            self._context,
            loaded,
            adapter,
            self._answered,
            manner=manner,
            phase=f"drift of arm {arm.arm.arm_id}",
            num_answers=self._num_all,
        )

    def _as_tokens(self, loaded: LoadedModel, arm: task_pb2.ArmModel, drawn: Records) -> _Own:
        """Return the baseline's answers behind their questions, each row's tokens of an answer chosen."""
        asker = loaded.asker(_without_system_prompt(arm.asking), self._context.check)
        asked = ask(asker, self._questions, no_shots, measured=False)
        count, references = len(self._questions), dict[int, Rendered]()
        for first, records in ((0, self._said[self._baseline]), (count, drawn)):
            for record in records:
                if record.token_ids and record.row in asked.prompts:
                    prompt = (*asked.prefix, *asked.prompts[record.row])
                    references[first + record.row] = _behind(prompt, record.token_ids)
        return _Own(tokens_digest=loaded.tokens_digest, references=references)

    def _records(self, arm_id: str) -> ArmRecords:
        return ArmRecords(
            said=self._said[arm_id],
            found=self._found.get(arm_id),
            read=self._read[arm_id],
            compared=self._compared.get(arm_id, ()),
        )


def _without_system_prompt(asking: task_pb2.Asking) -> task_pb2.Asking:
    """Return how weights are asked: what an arm is told besides is not what they have forgotten."""
    plain = task_pb2.Asking()
    plain.CopyFrom(asking)
    plain.ClearField("system_prompt")
    return plain


def _key(arm_id: str, part: str = "") -> str:
    """Return under which name answers are kept: none that an arm may have."""
    return "/".join(filter(None, ("drift", arm_id, part)))


def _texts(loaded: LoadedModel, arm: task_pb2.ArmModel, check: Check) -> dict[int, Rendered]:
    asker = loaded.asker(_without_system_prompt(arm.asking), check)
    return {row: _behind((), asker.raw(text)) for row, text in enumerate(general_texts())}


def _behind(prompt: Sequence[int], answer: Sequence[int]) -> Rendered:
    mask = (*(False for _ in prompt), *(True for _ in answer))
    return Rendered(input_ids=(*prompt, *answer), loss_mask=mask, ending_ids=(), num_asking=len(prompt))
