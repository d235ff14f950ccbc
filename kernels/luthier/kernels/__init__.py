"""Public operators: each has an eager reference and faster implementations chosen by a measured table."""

from luthier.kernels.linear_cross_entropy.table import TABLE_PATH


def table_digest() -> str:
    """SHA-256 of the committed tables that `auto` reads, for the record of a run."""
    import hashlib

    return hashlib.sha256(TABLE_PATH.read_bytes()).hexdigest()


def describe() -> dict[str, object]:
    """The instruction set of this process, and what its tables choose for each op, dtype and shape class."""
    from luthier.kernels.dispatch import current_isa
    from luthier.kernels.linear_cross_entropy.table import entries

    isa = current_isa()
    chosen = {key: impl for key, impl in entries().items() if key.startswith(f"{isa}/")}
    return {"isa": isa, "linear_cross_entropy": chosen}
