"""Base models in 8 and 4 bits: torchao's numbers, the same in every process, and never all weights in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow, to_nf4

from luthier.errors import InvalidArgument, Reason
from luthier.kernels.dequantise import dense, is_quantised
from luthier.lm.adapter_files import save_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, activate, adapter_parameters, insert_lora
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.precision import Precision, scales_together, weight_bytes
from luthier.lm.quantise import quantised, stored_bytes
from luthier.lm.readouts import FusedLoss, read

ModelMaker = Callable[..., Any]
QUANTISED: tuple[Precision, ...] = ("INT8", "NF4")


def weight(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(0.05).bfloat16()


def parts(tensor: Any) -> dict[str, Tensor]:
    found = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    return {name: part for name, part in found.items() if part is not None}


def same(one: Any, other: Any) -> bool:
    """Whether two quantised tensors have the same bytes."""
    first, second = parts(one), parts(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(64, 48), (192, 576), (300, 1024), (1024, 512)])
def test_the_codes_are_those_of_torchao(shape: tuple[int, int]) -> None:
    given = weight(*shape)
    together = scales_together(given.numel() // 64)
    assert same(quantised(given, "NF4"), to_nf4(given, 64, together))
    assert same(quantised(given, "INT8"), Int8Tensor.from_hp(given, PerRow()))
    assert quantised(given, "BFLOAT16") is given


@pytest.mark.parametrize("shape", [(1, 64), (192, 576), (300, 1024)])
@pytest.mark.parametrize("precision", QUANTISED)
def test_the_bytes_are_what_plans_count(precision: Precision, shape: tuple[int, int]) -> None:
    found = quantised(weight(*shape), precision)
    assert stored_bytes(found) == weight_bytes(precision, *shape)
    assert stored_bytes(dense(found)) == weight_bytes("BFLOAT16", *shape)


@pytest.mark.parametrize(("precision", "most"), [("INT8", 0.01), ("NF4", 0.1)])
def test_the_numbers_are_near(precision: Precision, most: float) -> None:
    given = weight(192, 576).float()
    found = dense(quantised(given.bfloat16(), precision)).float()
    assert (found - given).norm() <= most * given.norm()


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_bytes_do_not_depend_on_threads(precision: Precision) -> None:
    given = weight(1024, 1024)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(quantised(given, precision))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("precision", QUANTISED)
def test_zeros_stay_zeros_and_weights_that_are_all_alike_are_numbers(precision: Precision) -> None:
    """torchao's own NF4 makes a block of zeros of what it takes off and puts back to scales."""
    given = weight(8, 64)
    given[3] = 0
    assert not dense(quantised(given, precision))[3].any()
    alike = dense(quantised(torch.full((8, 64), 0.5, dtype=torch.bfloat16), precision))
    assert torch.allclose(alike.float(), torch.tensor(0.5), rtol=0.01)
    assert not dense(quantised(torch.zeros(8, 64, dtype=torch.bfloat16), precision)).any()


def test_what_has_no_whole_blocks_is_refused_by_name(tiny_model: ModelMaker, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NF4 needs a multiple of 64 weights, got 96"):
        quantised(weight(2, 48), "NF4")
    with pytest.raises(ValueError, match=r"must be bfloat16 to be made NF4, got torch\.float32"):
        quantised(weight(2, 64).float(), "NF4")
    tiny_model(hidden_size=8, intermediate_size=6, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(
        InvalidArgument, match="gate_proj of this model cannot be held in NF4: NF4 needs"
    ) as caught:
        load_model(tmp_path, precision="NF4")
    assert caught.value.reason == Reason.MODEL_INVALID
    assert load_model(tmp_path, precision="INT8")


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_model_has_its_linear_layers_quantised_and_nothing_else(
    tiny_model: ModelMaker, tmp_path: Path, precision: Precision
) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    plain, found = load_model(tmp_path), load_model(tmp_path, precision=precision)
    head: Any = found.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = [module for module in found.modules() if isinstance(module, nn.Linear) and module is not head]
    assert len(linears) == 14
    assert all(is_quantised(module.weight) for module in linears)
    others = dict(plain.named_parameters())
    for name, parameter in found.named_parameters():
        assert not parameter.requires_grad
        if is_quantised(parameter):
            assert same(parameter, quantised(others[name].detach(), precision))
        else:
            assert torch.equal(parameter, others[name])
    assert {name for name, _ in found.named_parameters()} == others.keys()


def batch() -> PackedBatch:
    rows = [[3 + place % 90 for place in range(count)] for count in (10, 14)]
    return pack(rows, {WEIGHT: [[1.0] * len(row) for row in rows]})


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_an_adapter_learns_beside_quantised_weights_as_beside_the_numbers_that_they_stand_for(
    tiny_model: ModelMaker, tmp_path: Path, family: str, precision: Precision
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    found = []
    for is_dense in (False, True):
        model = load_model(tmp_path, precision=precision)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for module in linears if is_dense else ():
            module.weight = nn.Parameter(dense(module.weight.detach()), requires_grad=False)
        insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=1)
        activate(model, "default")
        parameters = adapter_parameters(model, "default")
        for parameter in [one for name, one in parameters.items() if name.endswith("lora_B")]:
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
        loss = read(model, batch(), FusedLoss()).loss_sum
        loss.backward()  # type: ignore[no-untyped-call]
        grads = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        assert grads.keys() == parameters.keys()
        found.append((loss.detach(), grads))
    (loss, grads), (other, others) = found
    assert torch.equal(loss, other)
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())
    assert all(bool(grad.any()) for grad in grads.values())


def test_an_adapter_is_written_as_beside_plain_weights(tiny_model: ModelMaker, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    for name, precision in (("plain", "BFLOAT16"), ("four", "NF4")):
        model = load_model(tmp_path / "base", precision=precision)  # type: ignore[arg-type]
        insert_lora(model, LoraSpec(rank=4, alpha=8.0, trained_modules=("embed_tokens",)), seed=1)
        save_adapter(model, "default", tmp_path / name, base_model="base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "four" / file).read_bytes()


_HELD = """
import os, re, sys, pathlib
from luthier.lm import load, quantise
from luthier.lm.rehearsal import rehearse
from luthier.work.forking import require_alone
def held():
    status = pathlib.Path("/proc/self/status").read_text()
    maps = pathlib.Path("/proc/self/smaps").read_text()
    files = re.findall(r"\\.safetensors\\n(?:.*\\n)*?Rss: +([0-9]+) kB", maps)
    return int(re.search(r"RssAnon:\\s+([0-9]+)", status)[1]) + sum(map(int, files))
def load_and_tell(precision):
    before, most, made = held(), [], quantise.quantised
    def watched(weight, precision):
        found = made(weight, precision)
        most.append(held() - before)
        return found
    quantise.quantised = watched
    model = load.load_model(pathlib.Path(sys.argv[1]), precision=precision)
    if precision == "BFLOAT16":
        sum(float(one.sum()) for one in model.parameters())
    print(max([*most, held() - before]), held() - before, flush=True)
rehearse()
for precision in sys.argv[2:]:
    require_alone()
    if os.fork() == 0:
        load_and_tell(precision)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, (precision, status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read as Linux tells them")
def test_weights_are_never_all_in_memory_in_bfloat16(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Each precision has a process of its own, a copy of one that has imported what they need."""
    model = tiny_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=128)
    model.bfloat16().save_pretrained(tmp_path)
    size = sum(one.numel() for one in model.parameters()) * 2 // 1024
    del model
    precisions = ("BFLOAT16", "INT8", "NF4")
    command = [sys.executable, "-c", _HELD, str(tmp_path), *precisions]
    threadless = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    done = subprocess.run(
        command, env={**os.environ, **threadless}, stdout=subprocess.PIPE, text=True, check=True
    )
    told = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[-len(precisions) :]]
    held, lasting = ({name: one[at] for name, one in zip(precisions, told, strict=True)} for at in (0, 1))
    assert size > 100_000
    assert held["BFLOAT16"] > 0.95 * size
    # Besides what is held for good: a layer of 8 MiB on its way, and what is made of pieces of it, several times that.
    assert held["INT8"] < 0.9 * size, held
    assert lasting["INT8"] < 0.65 * size, lasting
    assert lasting["NF4"] < 0.45 * size, lasting
    assert held["NF4"] < 0.5 * size, held
