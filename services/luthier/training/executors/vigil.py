"""Whether the ranks of a training go on together: who hangs, and whether they reach one another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier.errors import Reason, Unavailable
from luthier.training.executors.pulse import BEAT_SECONDS, Shown

Look = Callable[[], Shown | None]
"""Returns what one rank shows just now; None: it has not begun."""
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long ranks may go without a sign.

    Attributes:
        still_seconds: one neither beats nor computes: it is stopped, or the kernel holds it.
        asleep_seconds: its thread that works sleeps, and waits for nobody that could wake it: less, as it is then asked
            where it is.
        apart_seconds: all have come to an exchange, and one does not come to its end.
        bytes_per_second: what that takes longer for the bytes that are exchanged: the slowest that is no fault.
        begin_seconds: one has not begun, though another has.
    """

    still_seconds: float = 5.0
    asleep_seconds: float = 4.0
    apart_seconds: float = 5.0
    bytes_per_second: float = 20e6
    begin_seconds: float = 600.0


class Vigil:
    """Looks at all ranks of one training, for any thread.

    Looks are counted, not only timed: a driver that was itself stopped for a while has seen nothing meanwhile.

    Args:
        looks: at each rank, by its number.
        bounds: what they may do.
        clock: seconds that only grow.
    """

    def __init__(
        self, looks: Sequence[Look], bounds: Bounds | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._looks = looks
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = -_LOOK_SECONDS
        self._signs: list[tuple[object, ...]] = [() for _ in looks]
        self._still = [_Since() for _ in looks]
        self._met: tuple[object, ...] = ()
        self._apart = _Since()
        self._missing = _Since()

    def look(self, gone: Sequence[int] = ()) -> None:
        """Look, unless that was a moment ago; ranks that are `gone`, their work done, need show nothing.

        Raises:
            Unavailable: RANK_LOST; STALLED, none is lost, and one lives and sleeps. The message names the ranks and how
                that shows.
        """
        with self._lock:
            now = self._clock()
            if now - self._looked_at < _LOOK_SECONDS:
                return
            self._looked_at = now
            found = {rank: look() for rank, look in enumerate(self._looks) if rank not in gone}
            begun = {rank: one for rank, one in found.items() if one is not None}
            for rank, one in begun.items():
                self._require_life(rank, one, now)
            if begun and len(begun) < len(found):
                if self._missing.seconds(now) > self._bounds.begin_seconds:
                    raise self._lost(sorted(found.keys() - begun.keys()), "did not begin with the others")
            elif len(begun) == len(self._looks):
                self._require_reach(begun, now)
            self._require_awake(begun)

    def _require_life(self, rank: int, one: Shown, now: float) -> None:
        signs = (one.beats, one.entered, one.left, one.cpu)
        if signs != self._signs[rank]:
            self._signs[rank] = signs
            self._still[rank] = _Since()
        if self._still[rank].seconds(now) > self._bounds.still_seconds:
            raise self._lost([rank], f"hangs, with no sign of life for {self._bounds.still_seconds:g} s")

    def _require_awake(self, begun: dict[int, Shown]) -> None:
        """Check it last: who sleeps is asked where it is, for as long as which it would hide who is lost."""
        for rank, one in begun.items():
            # A rank counts its beats itself: what it does while nobody looks, or nobody can, is no sleep.
            if one.asleep * BEAT_SECONDS > self._bounds.asleep_seconds:
                how = f"sleeps for {self._bounds.asleep_seconds:g} s in a wait that nothing in it ends"
                raise self._lost([rank], how, Reason.STALLED)

    def awaited(self, gone: Sequence[int] = ()) -> list[int]:
        """Return the ranks that the others wait for just now: they have not come to an exchange that one is in."""
        found = {rank: look() for rank, look in enumerate(self._looks) if rank not in gone}
        shown = {rank: one for rank, one in found.items() if one is not None}
        latest = max((one.entered for one in shown.values()), default=0)
        return [rank for rank, one in shown.items() if one.entered < latest]

    def _require_reach(self, begun: dict[int, Shown], now: float) -> None:
        """Check that what all have come to is ended by all; one that has not come yet may compute for long."""
        exchange = min(one.entered for one in begun.values())
        inside = [rank for rank, one in begun.items() if one.left < exchange]
        if (exchange, *inside) != self._met:
            self._met = (exchange, *inside)
            self._apart = _Since()
        moved = max(one.num_bytes for one in begun.values()) / self._bounds.bytes_per_second
        if inside and self._apart.seconds(now) > self._bounds.apart_seconds + moved:
            raise self._lost(
                inside, f"did not end exchange {exchange}, to which all came: they do not reach one another"
            )

    def _lost(self, ranks: Sequence[int], how: str, reason: Reason = Reason.RANK_LOST) -> Unavailable:
        named = ", ".join(map(str, ranks))
        return Unavailable(
            f"rank {named} of {len(self._looks)} {how}",
            reason=reason,
            metadata={"rank": named.replace(" ", "")},
        )


class _Since:
    """How long something has been so, as far as it was looked at."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds = 0.0

    def seconds(self, now: float) -> float:
        """Count the time since the last look, of which a long one may be the driver's own stop."""
        if self._last is not None:
            self._seconds += min(now - self._last, 2 * _LOOK_SECONDS)
        self._last = now
        return self._seconds
