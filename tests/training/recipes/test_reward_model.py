"""Reward models: the chosen answer scores higher, and transformers and PEFT give the same scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.training.recipes.pairs import pairs, put_word
from tests.training.recipes.test_preference import BATCHES, CPU, OPTIMISER, digests, settings_for
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.lm.adapter_files import load_adapter, load_reward_adapter
from luthier.lm.load import load_model, load_reward_model
from luthier.lm.lora import LoraSpec, insert_lora, use_adapter
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.readouts import SequenceValues, read
from luthier.training.recipes import checkpoint, reward_model
from luthier.training.recipes.batches import iterate_steps, plan_digest
from luthier.training.recipes.course import TIMED_METRICS, CheckpointDue, Course, Event
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import settings_record
from luthier.training.recipes.objectives import PairwiseReward
from luthier.training.recipes.weights import MASTERS_NAME, SCORE, Adapter, AllWeights, fresh_score

ModelMaker = Callable[..., PreTrainedModel]
LOSS = PairwiseReward(margin=0.1, centring=0.01)
TEXTS = [[5, 9, 11, 40, 3], [8, 77], [17, 21, 4, 60, 61, 62, 7, 9]]


class Run:
    """Weights of a tiny model with a head, and pairs."""

    def __init__(self, model: PreTrainedModel, kind: str, **changes: Any) -> None:
        self.corpus = pairs(20)
        self.settings = settings_for(self.corpus, replace(BATCHES, **changes), peak=2e-2)
        score = fresh_score(model, seed=5)
        if kind == "adapter":
            insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
            self.engine = Engine(Adapter(model, "default", base_model="tiny", score=score), OPTIMISER, CPU)
        else:
            self.engine = Engine(AllWeights(model, score=score), OPTIMISER, CPU)
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(
                self.corpus.lengths("TRAIN"), self.corpus.lengths("VALIDATION"), self.settings.batches
            ),
            settings=settings_record(self.settings, LOSS),
            optimiser=OPTIMISER,
            surroundings={},
        )

    def events(self, course: Course | None = None) -> Iterator[Event]:
        return reward_model.train(self.engine, self.corpus, self.settings, LOSS, course or Course())

    def finish(self, events: Iterator[Event], folder: Path) -> list[Mapping[str, float]]:
        metrics: list[Mapping[str, float]] = []
        for event in events:
            if isinstance(event, CheckpointDue):
                checkpoint.save(folder, self.engine, event.course, self.identity)
            else:
                metrics.append({key: one for key, one in event.metrics.items() if key not in TIMED_METRICS})
        return metrics

    def scores(self) -> torch.Tensor:
        batch = pack(TEXTS, {WEIGHT: [[1] * len(text) for text in TEXTS]})
        return self.engine.score(batch, SequenceValues(head=self.engine.weights.parameters[SCORE]))


def padded_scores(classifier: Any) -> torch.Tensor:
    width = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in TEXTS])
    with torch.no_grad():
        logits: torch.Tensor = classifier(input_ids=ids, attention_mask=(ids != 0).long()).logits
    assert logits.shape == (len(TEXTS), 1)
    return logits[:, 0]


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_train_gives_chosen_answers_the_higher_values(
    tiny_llama: ModelMaker, kind: str, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), kind, num_epochs=4)
    head = run.engine.weights.parameters[SCORE].detach().clone()
    steps = run.finish(run.events(), tmp_path)
    validations = [one for one in steps if "validation_loss" in one]
    assert validations[-1]["validation_loss"] < 0.5 * validations[0]["validation_loss"]
    assert validations[-1]["validation_reward_accuracy"] == 1.0
    assert validations[-1]["validation_reward_margin"] > validations[0]["validation_reward_margin"]
    assert not torch.equal(run.engine.weights.parameters[SCORE], head)


def test_a_step_cut_into_micro_batches_equals_one_batch_within_rounding(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    found = []
    for micro_batch_tokens in (40, 160):
        run = Run(tiny_llama(), "adapter", micro_batch_tokens=micro_batch_tokens, max_steps=4)
        steps = iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
        cuts = max(len(step.micro_batches) for step in steps)
        found.append((cuts, run.finish(run.events(), tmp_path)))
    (many, cut), (one, whole) = found
    assert many > 3
    assert one == 1
    for left, right in zip(cut, whole, strict=True):
        for name, value in right.items():
            assert left[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_train_resumed_from_a_checkpoint_ends_with_the_same_bits(
    tiny_llama: ModelMaker, kind: str, tmp_path: Path
) -> None:
    whole = Run(tiny_llama(torch.bfloat16), kind)
    wanted = whole.finish(whole.events(), tmp_path / "whole")
    first = Run(tiny_llama(torch.bfloat16), kind)
    for event in first.events():
        if isinstance(event, CheckpointDue):
            checkpoint.save(tmp_path / "stopped", first.engine, event.course, first.identity)
        elif event.step == 5:
            break
    second = Run(tiny_llama(torch.bfloat16), kind)
    course, changed = checkpoint.load(tmp_path / "stopped", second.engine, second.identity)
    rest = second.finish(second.events(course), tmp_path / "resumed")
    assert (course.step, changed) == (3, [])
    assert rest == wanted[3:]
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch(
    tiny_llama: ModelMaker, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_llama()
    run = Run(model, kind)
    step = next(iter(iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)))
    assert len(step.micro_batches) > 1
    bad, word = step.micro_batches[-1][0], 96  # which no row has
    with torch.no_grad():
        model.model.embed_tokens.weight[word] = float("inf")
    put_word(monkeypatch, run.corpus, bad, word)
    with pytest.raises(
        FailedPrecondition, match=r"must be finite, got nan at step 1, whose rows are"
    ) as caught:
        run.finish(run.events(), tmp_path)
    named = [int(row) for row in caught.value.metadata["rows"].split(",")]
    assert caught.value.reason == Reason.LOSS_NOT_FINITE
    assert named == list(step.micro_batches[-1])


# peft 0.21 reads it when it wraps a model of transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# The base has no head for values; PEFT brings it.
@pytest.mark.filterwarnings("ignore:Some weights of")
def test_an_adapter_is_a_sequence_classifier_in_peft_with_equal_scores(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), "adapter")
    run.finish(run.events(), tmp_path / "checkpoints")
    run.engine.weights.save(tmp_path / "adapter")
    tiny_llama(attention="eager").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    classifier = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert classifier.peft_config["default"].task_type == "SEQ_CLS"
    torch.testing.assert_close(padded_scores(classifier), run.scores(), rtol=1e-4, atol=1e-5)

    # PEFT would ask a hub whether the vocabulary of its base has changed.
    classifier.save_pretrained(str(tmp_path / "by_peft"), save_embedding_layers=False)
    for folder in ("adapter", "by_peft"):
        model = tiny_llama()
        _, score = load_reward_adapter(model, tmp_path / folder, "reward")
        batch = pack(TEXTS, {WEIGHT: [[1] * len(text) for text in TEXTS]})
        with use_adapter(model, "reward"), torch.no_grad():
            values = read(model, batch, SequenceValues(head=score))
        torch.testing.assert_close(values, run.scores(), rtol=1e-5, atol=1e-6)
        with pytest.raises(InvalidArgument, match="modules_to_save") as caught:
            load_adapter(tiny_llama(), tmp_path / folder, "answers")
        assert caught.value.reason == Reason.MODEL_INVALID


def test_a_plain_adapter_is_refused_as_a_reward_model(tiny_llama: ModelMaker, tmp_path: Path) -> None:
    model = tiny_llama()
    insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
    Adapter(model, "default", base_model="tiny").save(tmp_path)
    with pytest.raises(
        InvalidArgument, match=r"must have a head .*score.weight of shape \(1, 32\), got none"
    ):
        load_reward_adapter(tiny_llama(), tmp_path, "reward")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_a_sequence_classifier_in_transformers_with_equal_scores(
    tiny_llama: ModelMaker, tmp_path: Path, dtype: torch.dtype, *, tied: bool
) -> None:
    model: Any = tiny_llama(dtype)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    run = Run(model, "all", max_steps=3)
    run.finish(run.events(), tmp_path / "checkpoints")
    run.engine.weights.save(tmp_path / "model")
    (tmp_path / "model" / MASTERS_NAME).unlink(missing_ok=True)
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert classifier.config.num_labels == 1
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (3e-2, 3e-2)
    torch.testing.assert_close(padded_scores(classifier.eval()).float(), run.scores(), rtol=rtol, atol=atol)

    here = load_reward_model(tmp_path / "model", dtype)
    batch = pack(TEXTS, {WEIGHT: [[1] * len(text) for text in TEXTS]})
    with torch.no_grad():
        values = read(here.model, batch, SequenceValues(head=here.score))
    torch.testing.assert_close(values, run.scores(), rtol=rtol, atol=atol)
    assert torch.equal(here.score, run.engine.weights.parameters[SCORE].detach())
    with pytest.raises(InvalidArgument) as caught:
        load_model(tmp_path / "model")
    assert caught.value.reason == Reason.MODEL_INVALID


def test_padding_that_also_ends_texts_is_not_named_in_a_reward_models_config(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    model: Any = tiny_llama()
    model.config.pad_token_id = model.config.eos_token_id
    run = Run(model, "all")
    run.engine.weights.save(tmp_path)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert classifier.config.pad_token_id is None
    ended = [5, 9, 2]  # ends with the token that ends texts
    batch = pack([ended], {WEIGHT: [[1, 1, 1]]})
    value = run.engine.score(batch, SequenceValues(head=run.engine.weights.parameters[SCORE]))
    logits = classifier(input_ids=torch.tensor([ended])).logits.detach()
    torch.testing.assert_close(logits[0], value, rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id == 2
