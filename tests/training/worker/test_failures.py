"""What torch raises becomes what a program can switch on: too little memory, a GPU that failed."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import LuthierError, ResourceExhausted, Unavailable
from luthier.training.worker.failures import named_errors
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters

JOB = FineTuningJob(hyperparameters=Hyperparameters(micro_batch_tokens=77))
GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "error", "kind", "reason", "said"),
    [
        (CPU, MemoryError("x"), ResourceExhausted, "OUT_OF_MEMORY", "micro_batch_tokens 77"),
        (
            CPU,
            RuntimeError("[enforce fail] can't allocate memory: you tried"),
            ResourceExhausted,
            "OUT_OF_MEMORY",
            "77",
        ),
        (
            GPU,
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            ResourceExhausted,
            "OUT_OF_MEMORY",
            "Tried",
        ),
        (GPU, RuntimeError("CUDA error: out of memory"), ResourceExhausted, "OUT_OF_MEMORY", "77"),
        (
            GPU,
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            ResourceExhausted,
            "OUT_OF_MEMORY",
            "77",
        ),
        (
            GPU,
            RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with"),
            Unavailable,
            "CRASHED",
            "the device cuda:1 must work, it failed: CUDA error: an illegal memory access was encountered Compile",
        ),
        (GPU, RuntimeError("HIP error: the operation cannot be performed"), Unavailable, "CRASHED", "cuda:1"),
        (
            GPU,
            RuntimeError("CUDA driver error: unspecified launch failure"),
            Unavailable,
            "CRASHED",
            "cuda:1",
        ),
    ],
)
def test_an_error_of_memory_or_of_a_device_has_its_reason(
    device: torch.device, error: Exception, kind: type[LuthierError], reason: str, said: str
) -> None:
    with pytest.raises(kind) as caught, named_errors(JOB, device, []):
        raise error
    assert caught.value.reason == reason
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("device", "text"),
    [(GPU, "The size of tensor a (3) must match"), (CPU, "CUDA error: is only what a file says")],
)
def test_another_error_stays_what_it_is(device: torch.device, text: str) -> None:
    with pytest.raises(RuntimeError, match=r"tensor a|is only") as caught, named_errors(JOB, device, []):
        raise RuntimeError(text)
    assert str(caught.value) == text
