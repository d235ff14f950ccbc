"""`luthier jobs pause` and `resume`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from click.testing import Result

from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

Run = Callable[..., Result]


def test_pause_and_resume_name_the_job_and_what_comes_next(services: Any, run: Run) -> None:
    requests = []
    paused = FineTuningJob(name="projects/default/fineTuningJobs/one", state=FineTuningJob.STATE_PAUSED)
    paused.pause_time.FromSeconds(1_700_000_000)
    paused.paused_seconds = 75.0
    queued = FineTuningJob(name=paused.name, state=FineTuningJob.STATE_QUEUED)

    def answering(job: FineTuningJob) -> Any:
        def answer(request: Any, context: Any) -> FineTuningJob:
            requests.append(request)
            return job

        return answer

    services.answers |= {"PauseFineTuningJob": answering(paused), "ResumeFineTuningJob": answering(queued)}
    first, second = run("jobs", "pause", "one"), run("jobs", "resume", "one")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert [request.name for request in requests] == [paused.name] * 2
    assert all(request.request_id for request in requests)
    for words in ("PAUSED", "2023-11-14 22:13:20", "75 s"):
        assert words in first.stdout
    assert "luthier jobs resume one" in first.stderr
    assert "QUEUED" in second.stdout
    assert "luthier jobs watch one" in second.stderr
