def supports(isa: str) -> bool:
    """Whether this processor can run code compiled for `isa`: plain, avx2 or avx512_bf16."""

def linear_cross_entropy(
    *,
    hidden: int,
    weight: int,
    target: int,
    rows: int,
    loss: int,
    grad_hidden: int,
    num_rows: int,
    dim: int,
    vocab: int,
    hidden_stride: int,
    weight_stride: int,
    bfloat16: bool,
    isa: str,
    num_threads: int,
) -> None:
    """Losses of the chosen rows and their gradients; arguments are addresses and element strides."""
