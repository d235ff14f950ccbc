"""Public operators: each has an eager reference and faster implementations chosen by a measured table."""

from luthier.kernels.tables import OPS, digest, entries


def table_digest() -> str:
    """SHA-256 of the committed tables that `auto` reads, for the record of a run."""
    return digest()


def describe() -> dict[str, str]:
    """What the tables choose on this processor: `isa`, and `operator/dtype/class` -> cpu or eager."""
    from luthier.kernels.dispatch import current_isa

    isa = current_isa()
    chosen = {
        f"{op}/{key.removeprefix(f'{isa}/')}": impl
        for op in OPS
        for key, impl in entries(op).items()
        if key.startswith(f"{isa}/")
    }
    return {"isa": isa, **chosen}
