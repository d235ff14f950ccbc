"""Public operators: each has an eager reference and faster implementations chosen by a measured table."""

from luthier.kernels.tables import OPS, digest, entries


def table_digest() -> str:
    """SHA-256 of the committed tables that `auto` reads, for the record of a run."""
    return digest()


def describe(architecture: str | None = None) -> dict[str, str]:
    """What the tables choose on a GPU of this architecture, else on this processor.

    `isa` is the processor's instruction set; `operator/dtype/class` -> cpu, triton or eager.
    """
    from luthier.kernels.dispatch import current_isa

    isa = current_isa()
    chip = architecture or isa
    chosen = {
        f"{op}/{key.removeprefix(f'{chip}/')}": impl
        for op in OPS
        for key, impl in entries(op).items()
        if key.startswith(f"{chip}/")
    }
    return {"isa": isa, **chosen}
