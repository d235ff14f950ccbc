"""The benchmark of overload and of many watchers runs, and says what the service promises under load."""

from __future__ import annotations

import asyncio

import load


def test_the_fast_run_refuses_what_is_too_much_and_cuts_no_watcher_off() -> None:
    result = asyncio.run(load.measured(load.FAST, load.PARTS))
    for name in load.CALLS:
        seen = result["overload"][name]
        assert seen["sustainable_per_second"] > 0
        for part in ("1x", "4x", "after"):
            assert seen[part]["others"] == {}, (
                f"{name} {part}: answered OK or refused with a time, nothing else"
            )
        assert seen["4x"]["refused"] > 0, name
        assert seen["after"]["admitted_ms_p50"] < 1000, f"{name} is well again at once"
    watched = result["watchers"]
    assert (watched["complete"], watched["breaks"]) == (load.FAST.num_watchers, {})
    uploads = result["uploads"]
    assert len(uploads["mb_per_second"]) == load.FAST.num_uploads
    assert uploads["mb_per_second_p50"] > 1
