"""What is counted of a rendering's rows, by split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from luthier.data.splits import SPLITS
from luthier.text.statistics import Lengths
from luthier.text.units import Role
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, Split
from luthier.v1.rendering_pb2 import LengthStatistics, RenderingRoleStatistics, RenderingSplitStatistics


@dataclass(slots=True, kw_only=True)
class RoleCounts:
    """Rows of one role."""

    tokens: Lengths = field(default_factory=Lengths)
    supervised: Lengths = field(default_factory=Lengths)
    num_truncated: int = 0
    num_unsupervised: int = 0


@dataclass(slots=True, kw_only=True)
class SplitCounts:
    """Rows and records of one split, and the rows that have a role by it, in the order of their units."""

    rows: RoleCounts = field(default_factory=RoleCounts)
    roles: dict[str, RoleCounts] = field(default_factory=dict)
    num_rows: int = 0
    num_units: int = 0
    num_dropped: int = 0
    num_without_row: int = 0
    num_records: int = 0
    num_refused: int = 0
    longest_unit_tokens: int = 0

    def add_row(
        self, role: str, num_tokens: int, num_supervised: int, *, truncated: bool, idle: bool
    ) -> None:
        """Count a row; `idle`: something is to be learnt from it, and nothing is."""
        self.num_rows += 1
        for counts in (self.rows, *([self.roles.setdefault(role, RoleCounts())] if role else [])):
            counts.tokens.add(num_tokens)
            counts.supervised.add(num_supervised)
            counts.num_truncated += truncated
            counts.num_unsupervised += idle

    def add_unit(self, num_tokens: int, *, idle: bool) -> None:
        """Count a unit."""
        self.num_units += 1
        if not idle:
            self.longest_unit_tokens = max(self.longest_unit_tokens, num_tokens)

    def num_teaching(self, role: Role) -> int:
        """Return how many rows of a role are learnt from."""
        counts = self.roles.get(role, RoleCounts())
        return counts.tokens.count - counts.num_unsupervised


def split_statistics(counts: Mapping[Split.ValueType, SplitCounts]) -> list[RenderingSplitStatistics]:
    """Return the counts of all splits that have some."""
    return [_split_statistics(split, counts[split]) for split in SPLITS if split in counts]


def count_warnings(counts: Mapping[Split.ValueType, SplitCounts]) -> Iterator[str]:
    """Yield what the counts show to be wrong with the train split."""
    train = counts.get(SPLIT_TRAIN, SplitCounts())
    if train.num_rows == 0:
        yield "the train split has no rows: there is nothing to learn from"
    elif train.num_rows == train.rows.num_unsupervised:
        yield f"none of the {train.num_rows} rows of the train split has a token to learn"
    labels = {role: train.num_teaching(role) for role in (Role.DESIRABLE, Role.UNDESIRABLE)}
    for role, count in labels.items():
        if count and count == sum(labels.values()):
            yield (
                f"all {count} answers of the train split that are learnt from are labelled {role}: there is nothing to "
                "tell them from"
            )


def _split_statistics(split: Split.ValueType, counts: SplitCounts) -> RenderingSplitStatistics:
    return RenderingSplitStatistics(
        split=split,
        tokens=_lengths(counts.rows.tokens),
        supervised_tokens=_lengths(counts.rows.supervised),
        num_dropped=counts.num_dropped,
        num_truncated=counts.rows.num_truncated,
        num_unsupervised=counts.rows.num_unsupervised + counts.num_without_row,
        num_records=counts.num_records,
        num_refused=counts.num_refused,
        num_without_row=counts.num_without_row,
        roles=[
            RenderingRoleStatistics(
                role=role,
                tokens=_lengths(rows.tokens),
                supervised_tokens=_lengths(rows.supervised),
                num_truncated=rows.num_truncated,
            )
            for role, rows in sorted(counts.roles.items(), key=lambda entry: _ORDER[entry[0]])
        ],
        num_units=counts.num_units,
        longest_unit_tokens=counts.longest_unit_tokens,
    )


_ORDER = {role.value: place for place, role in enumerate(Role)}


def _lengths(lengths: Lengths) -> LengthStatistics:
    return LengthStatistics(**asdict(lengths.summary()))
