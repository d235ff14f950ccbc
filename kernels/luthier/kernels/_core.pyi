"""The C++ kernels: functions over raw addresses; strides and sizes are in elements. See kernels/csrc/include."""

from collections.abc import Mapping, Sequence
from typing import Any

_Rows = tuple[int, int]
_Heads = tuple[int, int, int]
_Term = tuple[int, int, int, int, int, bool]
_Codes = tuple[int, int, int, int, int]
_Quantised = tuple[int, int, _Codes, int, bool]
_Part = tuple[_Term, int, int, int]
_Rounding = tuple[int, int, int, float]
_Cache = tuple[int, ...]
_Gram = tuple[int, int, int, int, int, int, int, float, int, bool]

def supports(isa: str) -> bool: ...
def product(
    *,
    terms: Sequence[_Term | _Quantised | _Part],
    num_rows: int,
    num_columns: int,
    bias: int,
    addend: _Rows,
    out: _Rows,
    bfloat16: bool,
    float_out: bool,
    isa: str,
    num_threads: int,
) -> None: ...
def gram(*, problems: Sequence[_Gram], bfloat16: bool, isa: str, num_threads: int) -> None: ...
def round_to(*, problems: Sequence[_Rounding], bfloat16: bool, isa: str, num_threads: int) -> None: ...
def attention(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def attention_gradient(
    problem: Mapping[str, Any],
    *,
    grad_out: _Heads,
    grad_query: _Heads,
    grad_key: _Heads,
    grad_value: _Heads,
    isa: str,
    num_threads: int,
) -> None: ...
def attention_decode(
    problem: Mapping[str, Any],
    *,
    caches: Sequence[_Cache],
    first: Sequence[int],
    isa: str,
    num_threads: int,
) -> None: ...
def linear_cross_entropy(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def rms_norm(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def rms_norm_gradient(problem: Mapping[str, Any], *, grad_out: _Rows, isa: str, num_threads: int) -> None: ...
def rope(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def gated(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def dropout(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def adamw_8bit(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...
def dequantise(problem: Mapping[str, Any], *, isa: str, num_threads: int) -> None: ...

class Program:
    """Steps that are told once and run many times, for any number of rows."""

    def product(
        self,
        *,
        terms: Sequence[_Term | _Quantised | _Part],
        num_rows: int,
        num_columns: int,
        bias: int,
        addend: _Rows,
        out: _Rows,
        bfloat16: bool,
    ) -> None: ...
    def rms_norm(self, problem: Mapping[str, Any], rows_of_row: int) -> None: ...
    def gated(self, problem: Mapping[str, Any]) -> None: ...
    def round_to(self, problems: Sequence[_Rounding], bfloat16: bool) -> None: ...
    def attend(self, problem: Mapping[str, Any], layer: int, turns: bool) -> None: ...
    def run(
        self,
        *,
        num_rows: int,
        layers: Sequence[Sequence[_Cache]],
        first: Sequence[int],
        angles: tuple[int, int, int, int, bool],
        isa: str,
        num_threads: int,
    ) -> None: ...
