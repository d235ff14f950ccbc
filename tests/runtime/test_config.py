"""Configuration: one reader, misspelt names refused, every value checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from luthier.errors import InvalidArgument
from luthier.runtime.config import read


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    home: Path
    projects: tuple[str, ...]
    lease_seconds: float = 30.0
    workers: int = 1
    verbose: bool = False


def test_read_takes_defaults_where_nothing_is_set() -> None:
    config = read(Config, section="DATA", environ={})
    assert config.home == Path("~/.local/share/luthier").expanduser()
    assert (config.projects, config.lease_seconds, config.workers) == (("default",), 30.0, 1)


def test_read_takes_the_environment() -> None:
    environ = {
        "LUTHIER_HOME": "/x",
        "LUTHIER_PROJECTS": "a, b",
        "LUTHIER_DATA_LEASE_SECONDS": "1.5",
        "LUTHIER_DATA_VERBOSE": "true",
        "LUTHIER_TRAINING_ANYTHING": "left to its owner",
        "OTHER": "ignored",
    }
    config = read(Config, section="DATA", environ=environ)
    assert (config.home, config.projects) == (Path("/x"), ("a", "b"))
    assert (config.lease_seconds, config.verbose) == (1.5, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    keep_seconds: float = 7.0

    def __post_init__(self) -> None:
        if self.keep_seconds < 0:
            raise InvalidArgument(f"keep_seconds must be positive, got {self.keep_seconds:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    home: Path
    alike: Alike = field(default_factory=Alike)


def test_settings_that_sections_have_alike_have_their_own_names() -> None:
    assert read(Whole, section="DATA", environ={}).alike == Alike()
    environ = {"LUTHIER_DATA_KEEP_SECONDS": "8", "LUTHIER_TRAINING_KEEP_SECONDS": "-1"}
    assert read(Whole, section="DATA", environ=environ).alike.keep_seconds == 8
    with pytest.raises(InvalidArgument, match="keep_seconds must be positive, got -1"):
        read(Whole, section="TRAINING", environ=environ)
    with pytest.raises(InvalidArgument, match="did you mean LUTHIER_DATA_KEEP_SECONDS"):
        read(Whole, section="DATA", environ={"LUTHIER_DATA_KEP_SECONDS": "8"})
    with pytest.raises(InvalidArgument, match="LUTHIER_DATA_ALIKE is not a setting"):
        read(Whole, section="DATA", environ={"LUTHIER_DATA_ALIKE": "8"})


def test_a_part_of_a_section_leaves_the_rest_of_it_to_its_owner() -> None:
    environ = {"LUTHIER_DATA_WORKERS": "2", "LUTHIER_DATA_ANYTHING": "its owner's", "LUTHIER_HOEM": "/x"}
    with pytest.raises(InvalidArgument, match="did you mean LUTHIER_HOME"):
        read(Config, section="DATA", environ=environ, is_part=True)
    del environ["LUTHIER_HOEM"]
    assert read(Config, section="DATA", environ=environ, is_part=True).workers == 2
    with pytest.raises(InvalidArgument, match="LUTHIER_DATA_ANYTHING is not a setting"):
        read(Config, section="DATA", environ=environ)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LUTHIER_DATA_WORKER", "3", "did you mean LUTHIER_DATA_WORKERS"),
        ("LUTHIER_HOEM", "/x", "did you mean LUTHIER_HOME"),
        ("LUTHIER_DATA_WORKERS", "many", "LUTHIER_DATA_WORKERS must be a whole number, got 'many'"),
        ("LUTHIER_DATA_VERBOSE", "maybe", "must be true or false, got 'maybe'"),
        ("LUTHIER_CONFIG", "/no/such/file", "must name a readable file, got /no/such/file"),
    ],
)
def test_read_refuses_what_it_does_not_understand(name: str, value: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(Config, section="DATA", environ={name: value})
    assert said in caught.value.message


def test_read_takes_a_file_and_the_environment_wins(tmp_path: Path) -> None:
    path = tmp_path / "luthier.toml"
    path.write_text('home = "/from/file"\n[data]\nworkers = 4\nlease_seconds = 2\n')
    environ = {"LUTHIER_CONFIG": str(path), "LUTHIER_DATA_WORKERS": "8"}
    config = read(Config, section="DATA", environ=environ)
    assert (config.home, config.workers, config.lease_seconds) == (Path("/from/file"), 8, 2.0)


def test_read_refuses_an_unknown_key_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "luthier.toml"
    path.write_text("[data]\nwrokers = 4\n")
    with pytest.raises(InvalidArgument, match=r"data\.wrokers.*did you mean LUTHIER_DATA_WORKERS"):
        read(Config, section="DATA", environ={"LUTHIER_CONFIG": str(path)})
