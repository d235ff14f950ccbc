"""A model that is divided among ranks: the steps of one rank, and each trap of FSDP2 that would make others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes.crews import Run, divided
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.errors import FailedPrecondition, InvalidArgument, Unavailable
from luthier.lm.blocks import Attention, GatedMlp, RmsNorm
from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.kept import CHECKPOINTINGS
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.lora_layer import LoraLinear
from luthier.lm.readouts import FusedLoss, read
from luthier.training.recipes.batches import iterate_steps
from luthier.training.recipes.collective import Collective, OneRank, dealt
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.shards import Division
from luthier.training.recipes.weights import Adapter

ModelMaker = Callable[..., PreTrainedModel]
RunMaker = Callable[..., Run]
CPU = torch.device("cpu")
OURS = (Attention, GatedMlp, RmsNorm)


@pytest.fixture
def make_run(tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]]) -> RunMaker:
    def make(
        method: str,
        kind: str = "adapter",
        rollouts: Any = None,
        *,
        dtype: Any = torch.bfloat16,
        **changes: Any,
    ) -> Run:
        return Run(tiny_llama(dtype), token_rows(40), method, kind, rollouts, **changes)

    return make


def gradients_of(engine: Engine, run: Run, collective: Collective) -> dict[str, Tensor]:
    """Accumulate the passes of a run's first step, and return the whole gradient of each parameter."""
    step = next(iter(iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)))
    for rows, counts in dealt(step.micro_batches, collective):
        batch = run.corpus.pack(rows)
        assert counts, "all ranks have as many passes"
        engine.accumulate(batch, FusedLoss(), supervised(step.num_supervised))
    shards, weights = engine.weights.shards, engine.weights
    of_parts: dict[str, Any] = {name: one.grad for name, one in weights.parameters.items()}
    if shards is None:
        return of_parts
    return dict(
        shards.whole((name, shards.divided(one, weights.divided[name])) for name, one in of_parts.items())
    )


def test_gradients_are_sums_over_ranks_of_adapters_that_nothing_rounds(
    make_run: RunMaker, tmp_path: Path
) -> None:
    """FSDP2 averages by default; rounded to bfloat16 factors would be off by some thousandths."""
    run = make_run("sft", batch_tokens=192)
    wanted = gradients_of(run.engine(OneRank()), run, OneRank())

    def found(collective: Collective) -> dict[str, Any]:
        run = make_run("sft", batch_tokens=192)
        whole = gradients_of(run.engine(collective), run, collective)
        return {name: gradient.numpy() for name, gradient in whole.items()}

    for name, gradient in divided(2, tmp_path, found)[1].items():
        scale = wanted[name].abs().max()
        assert (torch.from_numpy(gradient) - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_a_rank_holds_its_part_and_layers_are_whole_only_while_they_compute(
    make_run: RunMaker, tmp_path: Path
) -> None:
    """The frozen base keeps its type beside float32 factors in the same unit; a tied head is one weight."""

    def held(collective: Collective) -> Any:
        run = make_run("sft")
        total = sum(weight.numel() for weight in run.model.parameters())
        engine = run.engine(collective)
        model = engine.weights.model
        seen: list[Any] = []

        def look(layer: Any, *_: Any) -> None:
            factor = layer.lora_A["default"]
            shapes = (tuple(layer.weight.shape), tuple(factor.shape))
            seen.append((type(layer.weight), layer.weight.dtype, factor.dtype, shapes))

        layer = next(one for one in model.modules() if isinstance(one, LoraLinear))
        layer.register_forward_pre_hook(look)
        batch = run.corpus.pack((0, 1))
        engine.score(batch, FusedLoss())
        parts = sum(weight.to_local().numel() for weight in model.parameters() if isinstance(weight, DTensor))
        factors = sum(one.numel() for one in engine.weights.parameters.values())
        is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        all_parts = all(isinstance(weight, DTensor) for weight in model.parameters())
        return (total, parts, factors, is_tied, all_parts, seen)

    for total, parts, factors, is_tied, all_parts, seen in divided(2, tmp_path, held):
        assert all_parts, "also after a pass without a gradient, which FSDP leaves whole at its root"
        assert is_tied
        assert abs(parts - factors - total / 2) <= 32, "of an odd number of words one has a row more"
        (one,) = seen
        assert one == (torch.nn.Parameter, torch.bfloat16, torch.float32, ((32, 32), (4, 32)))


def test_a_file_leaves_memory_as_its_units_are_divided(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")

    def mapped(collective: Collective) -> tuple[int, int]:
        model = load_model(tmp_path / "model")
        insert_lora(model, LoraSpec(rank=2, alpha=4.0, targets=("q_proj",)), seed=1)
        # As the weights of units that are not divided yet do, they keep the file mapped.
        weights = [weight.detach() for weight in model.parameters()]
        sum(weight.sum() for weight in weights)
        before = _file_bytes()
        Adapter(model, "default", base_model="m", division=Division(collective=collective, device=CPU))
        assert len(weights) > 20
        return before, _file_bytes()

    for before, after in divided(2, tmp_path / "ranks", mapped):
        assert before > 3 << 20
        assert after < before / 4


def test_what_is_divided_computes_with_our_blocks(
    tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """FSDP2 makes classes of its own of what it divides: blocks that are known by theirs are put in place before."""
    tiny_llama().save_pretrained(tmp_path / "model")

    def called(collective: Collective) -> tuple[int, set[str]]:
        run = Run(load_model(tmp_path / "model"), token_rows(10), "sft", "adapter")
        engine, seen = run.engine(collective), set[str]()
        ours = [module for module in engine.weights.model.modules() if isinstance(module, OURS)]
        for module in ours:
            module.register_forward_pre_hook(lambda one, _: seen.add(type(one).__name__))
        engine.score(run.corpus.pack((0, 1)), FusedLoss())
        return len(ours), seen

    for count, seen in divided(2, tmp_path / "ranks", called):
        assert count == 2 * (1 + 1 + 2) + 1, "of each layer attention, MLP and norms; the last norm"
        assert len(seen) == len(OURS), seen


def _file_bytes() -> int:
    """Return how much of files of weights is in the memory of this process."""
    total, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_file = line.endswith(".safetensors")
        elif is_file and name == "Rss:":
            total += int(values[0]) << 10
    return total


def test_a_pass_is_read_inside_the_model_and_an_update_changes_the_next_one(
    make_run: RunMaker, tmp_path: Path
) -> None:
    """A head that is read outside is a part; parameters that were bound before would no longer be the model's."""

    def losses(engine: Engine, run: Run) -> list[float]:
        batch, found = run.corpus.pack((0, 1, 2)), []
        for _ in range(3):
            # Twice: what a pass without a gradient leaves whole would be used after the update.
            found += [engine.measure(batch, FusedLoss(), supervised(9))["train_loss"] for _ in range(2)]
            engine.accumulate(batch, FusedLoss(), supervised(9))
            engine.update(1e-2)
        return found

    alone = make_run("sft", "all")
    wanted = losses(alone.engine(OneRank()), alone)

    def found(collective: Collective) -> Any:
        run = make_run("sft", "all")
        engine = run.engine(collective)
        told = ""
        try:
            read(engine.weights.model, run.corpus.pack((0, 1)), FusedLoss())
        except RuntimeError as error:
            told = str(error)
        return losses(engine, run), told

    for numbers, told in divided(2, tmp_path, found):
        assert "DTensor" in told or "root" in told, told
        assert numbers[0] == numbers[1] > numbers[2] == numbers[3] > numbers[4]
        # Each made the same pass: of gradients twice as large, whose scale clipping and AdamW take away.
        assert numbers == pytest.approx(wanted, rel=1e-2)


def test_a_rank_makes_passes_alone_while_it_has_all_weights(make_run: RunMaker, tmp_path: Path) -> None:
    """As for answers that are drawn, of which one rank may have more than another, or none."""
    alone = make_run("sft")
    batch = alone.corpus.pack((0, 1))
    wanted = alone.engine(OneRank()).measure(batch, FusedLoss(), supervised(5))

    def work(collective: Collective) -> Any:
        run = make_run("sft")
        engine = run.engine(collective)
        model = engine.weights.model
        exchanged: list[int] = []
        exchange = collective.exchange

        def counted(num_bytes: int, **options: Any) -> Any:
            exchanged.append(num_bytes)
            return exchange(num_bytes, **options)

        vars(collective)["exchange"] = counted

        def passes() -> list[float]:
            exchanged.clear()
            found = [read(model, batch, FusedLoss()).loss_sum.item() for _ in range(3 * collective.rank)]
            assert not exchanged
            assert not any(isinstance(weight, DTensor) for weight in model.parameters())
            return found

        drawn = engine.with_whole_weights(passes)
        assert len(exchanged) == 0
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        after = engine.measure(batch, FusedLoss(), supervised(5))["train_loss"]
        return drawn, after, len(exchanged)

    (none, first, num_exchanges), (some, second, _) = divided(2, tmp_path, work)
    assert (none, len(some)) == ([], 3)
    assert [*some, first, second] == pytest.approx([wanted["train_loss"]] * 5, rel=1e-3)
    assert num_exchanges == 3, "two layers, and what is in none"


def test_what_layers_compute_again_changes_no_bit_of_divided_weights(
    make_run: RunMaker, tmp_path: Path
) -> None:
    def made(collective: Collective) -> Any:
        found = []
        for kept in CHECKPOINTINGS:
            run = make_run("sft")
            engine = run.engine(collective)
            checkpoint_layers(engine.weights.model, kept)
            gradients = gradients_of(engine, run, collective)
            norm = engine.update(1e-3)
            found.append((norm, [one.sum().item() for one in gradients.values()]))
        return found

    found = divided(2, tmp_path, made)
    assert found[0] == found[1]
    assert found[0][0] == found[0][1] == found[0][2]


def test_the_norm_counts_every_part_once_and_what_is_whole_once(make_run: RunMaker, tmp_path: Path) -> None:
    """A reward model's head is on every rank, and odd rows are on one more than on another."""

    def norm(engine: Engine) -> float:
        for parameter in engine.weights.parameters.values():
            assert parameter.grad is not None
            parameter.grad.fill_(0.5)
        return engine.update(0.0)

    alone = make_run("reward_model", "all")
    wanted = norm(alone.engine(OneRank()))

    def found(collective: Collective) -> float:
        engine = make_run("reward_model", "all").engine(collective)
        for name, parameter in engine.weights.parameters.items():
            assert parameter.grad is not None
            # What each has whole is summed over the ranks by the update, parts are before.
            parameter.grad.fill_(0.5 if name in engine.weights.divided else 0.5 / collective.num_ranks)
        return engine.update(0.0)

    for one in divided(3, tmp_path, found):
        assert one == pytest.approx(wanted, rel=1e-6)


def test_a_rank_that_is_gone_in_the_middle_of_a_pass_is_lost(make_run: RunMaker, tmp_path: Path) -> None:
    def work(collective: Collective) -> str:
        run = make_run("sft")
        engine = run.engine(collective)
        batch = run.corpus.pack((0, 1))
        engine.accumulate(batch, FusedLoss(), supervised(5))
        if collective.rank:
            return "left"
        try:
            for _ in range(100):
                engine.accumulate(batch, FusedLoss(), supervised(5))
        except Unavailable as error:
            return error.reason or ""
        return ""

    assert divided(2, tmp_path, work) == ["RANK_LOST", "left"]


def test_ranks_that_made_other_updates_say_so_before_a_checkpoint(make_run: RunMaker, tmp_path: Path) -> None:
    def work(collective: Collective) -> list[str]:
        told = []
        engine = make_run("reward_model").engine(collective)
        engine.require_same_weights()
        with torch.no_grad():
            engine.weights.parameters["score.weight"].view(-1)[3] += 1e-7 * collective.rank
        for number in (0, collective.rank):
            vars(engine)["_num_updates"] = number
            try:
                engine.require_same_weights()
            except Unavailable as error:
                told.append(error.reason or "")
        return told

    assert divided(2, tmp_path, work) == [["RANKS_DIVERGED"] * 2] * 2


def test_what_cannot_be_divided_is_refused_by_name(tiny_llama: ModelMaker, tmp_path: Path) -> None:
    def work(collective: Collective) -> list[tuple[str, str]]:
        division, told = Division(collective=collective, device=CPU), []
        whole = tiny_llama(torch.bfloat16)
        spec = LoraSpec(rank=2, alpha=4.0, targets=("q_proj",), trained_modules=("embed_tokens",))
        insert_lora(whole, spec, seed=1)
        shallow = LlamaForCausalLM(
            LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        insert_lora(shallow, LoraSpec(rank=2, alpha=4.0, targets=("q_proj",)), seed=1)
        shallow.model.layers = torch.nn.ModuleList([_NoLayer(shallow.model.layers[0])])
        shallow.set_submodule("model.layers.0", _NoLayer(shallow.model.layers[0]))
        for model in (whole, shallow):
            try:
                Adapter(model, "default", base_model="tiny", division=division)
            except (InvalidArgument, FailedPrecondition) as error:
                told.append((error.reason or "", error.message))
        return told

    (whole, shallow), _ = divided(2, tmp_path, work)
    assert whole[0] == shallow[0] == "SHARDING_INVALID"
    assert "must train no module whole, 'default' trains ['lm_head', 'model.embed_tokens']" in whole[1]
    assert "must have decoder layers" in shallow[1]


class _NoLayer(torch.nn.Module):
    """What transformers would not compute again as a layer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
