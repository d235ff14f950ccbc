"""How long what is over is kept: settings of each service, and what is none is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.data.__main__ import settings_of as data_settings
from luthier.data.config import Config as DataConfig
from luthier.errors import InvalidArgument
from luthier.evaluation.__main__ import settings_of as evaluation_settings
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.runtime.config import read
from luthier.training.__main__ import settings_of as training_settings
from luthier.training.config import Config as TrainingConfig
from luthier.work.keeping import Keeping

SERVICES: dict[str, tuple[type[Any], Any]] = {
    "DATA": (DataConfig, data_settings),
    "TRAINING": (TrainingConfig, training_settings),
    "EVALUATION": (EvaluationConfig, evaluation_settings),
}
NAMES = ("event_keep_seconds", "task_keep_seconds", "answer_keep_seconds", "deleted_keep_seconds")
DAY = 86_400.0


def keeping_of(service: str, home: Path, **settings: str) -> Keeping:
    """What a service is hosted with."""
    config, settings_of = SERVICES[service]
    environ = {f"LUTHIER_{service}_{name.upper()}": value for name, value in settings.items()}
    hosted = settings_of(read(config, section=service, environ={"LUTHIER_HOME": str(home), **environ}))
    assert isinstance(hosted.keeping, Keeping)
    return hosted.keeping


@pytest.mark.parametrize("service", list(SERVICES))
def test_each_service_keeps_what_its_settings_say(service: str, tmp_path: Path) -> None:
    usual = keeping_of(service, tmp_path)
    assert [getattr(usual, name) / DAY for name in NAMES] == [90, 30, 7, 30]
    changed = keeping_of(service, tmp_path, **{name: f"{3600 + n}" for n, name in enumerate(NAMES)})
    assert [getattr(changed, name) for name in NAMES] == [3600, 3601, 3602, 3603]


@pytest.mark.parametrize("service", list(SERVICES))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seconds", ["-1", "3599", "3155760001", "inf", "nan"])
def test_a_time_that_nothing_can_be_kept_for_is_refused_by_name(
    service: str, name: str, seconds: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} must be .*from 3600 to 3155760000 .*, got {seconds}"):
        keeping_of(service, tmp_path, **{name: seconds})


@pytest.mark.parametrize("name", NAMES[:3])
def test_what_is_kept_for_ever_is_zero_seconds(name: str, tmp_path: Path) -> None:
    assert getattr(keeping_of("DATA", tmp_path, **{name: "0"}), name) == 0


def test_what_is_deleted_is_not_kept_for_ever_nor_for_no_time(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"deleted_keep_seconds must be from 3600 .*got 0; .*--now"):
        keeping_of("DATA", tmp_path, deleted_keep_seconds="0")
    with pytest.raises(
        InvalidArgument, match="LUTHIER_DATA_DELETED_KEEP_SECONDS must be a number, got 'a month'"
    ):
        keeping_of("DATA", tmp_path, deleted_keep_seconds="a month")
    with pytest.raises(InvalidArgument, match="did you mean LUTHIER_DATA_EVENT_KEEP_SECONDS"):
        keeping_of("DATA", tmp_path, events_keep_seconds="3600")
