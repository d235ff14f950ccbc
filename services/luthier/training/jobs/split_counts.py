"""What a rendering says of its rows by split, without one of them being looked at."""

from __future__ import annotations

from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION, Split
from luthier.v1.rendering_pb2 import Rendering, RenderingSplitStatistics


def statistics_of(rendering: Rendering, split: Split.ValueType) -> RenderingSplitStatistics:
    """Return what a rendering says of a split; all zero where it has no row of it."""
    found = (one for one in rendering.split_statistics if one.split == split)
    return next(found, RenderingSplitStatistics(split=split))


def num_idle(split: RenderingSplitStatistics) -> int:
    """Return the rows of a split that teach nothing."""
    return split.num_unsupervised - split.num_without_row


def num_teaching(split: RenderingSplitStatistics) -> int:
    """Return the rows of a split that have something to learn."""
    return split.tokens.count - num_idle(split)


def longest_prompt(rendering: Rendering) -> int:
    """Return the tokens of the longest row of a rendering of prompts, of which none is idle."""
    return max(statistics_of(rendering, split).tokens.maximum for split in (SPLIT_TRAIN, SPLIT_VALIDATION))
