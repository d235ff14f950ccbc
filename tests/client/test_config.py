"""Where a client finds its configuration, and short names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.client import names
from luthier.client.config import ClientConfig, ConfigArguments, read_config
from luthier.errors import InvalidArgument, Unauthenticated


def test_read_config_takes_arguments_before_environment_before_defaults(home: Path) -> None:
    environ = {
        "LUTHIER_HOME": str(home),
        "LUTHIER_DATA_ADDRESS": "127.0.0.1:1",
        "LUTHIER_TRAINING_ADDRESS": "127.0.0.1:2",
        "LUTHIER_CLIENT_TIMEOUT_SECONDS": "7.5",
    }
    config = read_config(ConfigArguments(training_address="127.0.0.1:9"), environ)
    assert config.data_address == "127.0.0.1:1"
    assert config.training_address == "127.0.0.1:9"
    assert config.evaluation_address == "127.0.0.1:7603"
    assert config.project == "default"
    assert config.timeout_seconds == 7.5
    assert read_config(ConfigArguments(timeout_seconds=2.0), environ).timeout_seconds == 2.0


def test_read_config_finds_the_key_in_argument_environment_or_home(home: Path) -> None:
    environ = {"LUTHIER_HOME": str(home), "LUTHIER_CLIENT_API_KEY": "of-environ"}
    assert read_config(ConfigArguments(api_key="said"), environ).api_key == "said"
    assert read_config(ConfigArguments(), environ).api_key == "of-environ"
    assert read_config(ConfigArguments(), {"LUTHIER_HOME": str(home)}).api_key == "test-key"
    assert read_config(ConfigArguments(home=home), {"LUTHIER_HOME": "/nonexistent"}).api_key == "test-key"


def test_read_config_without_a_key_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match="api-key") as caught:
        read_config(ConfigArguments(home=tmp_path), {})
    assert caught.value.reason == "CREDENTIALS_MISSING"
    assert str(tmp_path) in caught.value.message


def test_read_config_refuses_unknown_names_of_its_section() -> None:
    with pytest.raises(InvalidArgument, match="LUTHIER_CLIENT_APIKEY"):
        read_config(ConfigArguments(), {"LUTHIER_CLIENT_APIKEY": "k"})


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_read_config_refuses_a_timeout_that_is_none(text: str) -> None:
    environ = {"LUTHIER_CLIENT_API_KEY": "k", "LUTHIER_CLIENT_TIMEOUT_SECONDS": text}
    with pytest.raises(InvalidArgument, match="timeout_seconds"):
        read_config(ConfigArguments(), environ)


@pytest.mark.parametrize("key", ["sek\nret", "sek ret", "sek\tret", "sekrét", "sekret\x00"])
def test_read_config_refuses_a_key_that_no_header_carries_and_does_not_repeat_it(
    key: str, tmp_path: Path
) -> None:
    (tmp_path / "api-key").write_text(key + "\n", encoding="utf-8")
    readings: list[Callable[[], object]] = [
        lambda: read_config(ConfigArguments(api_key=key), {}),
        lambda: read_config(ConfigArguments(), {"LUTHIER_CLIENT_API_KEY": key}),
        lambda: read_config(ConfigArguments(home=tmp_path), {}),
        lambda: ClientConfig(api_key=key),
    ]
    for read in readings:
        with pytest.raises(InvalidArgument, match="must consist of visible ASCII characters") as caught:
            read()
        assert "sek" not in str(caught.value)


def test_config_never_shows_the_key() -> None:
    assert "secret" not in repr(ClientConfig(api_key="secret"))


def test_names_are_completed_below_the_project() -> None:
    assert names.child("p", "datasets", "d") == "projects/p/datasets/d"
    assert (
        names.version("p", "d/v1")
        == names.version("p", "d/versions/v1")
        == "projects/p/datasets/d/versions/v1"
    )
    assert names.checkpoint("p", "j/c") == "projects/p/fineTuningJobs/j/checkpoints/c"
    full = "projects/q/datasets/d/versions/v1"
    assert names.version("p", full) == full
    assert names.short(full) == "d/v1"
    assert names.version("q", names.short(full)) == full


@pytest.mark.parametrize("name", ["", "d", "d/", "/v", "a/b/c", "d/checkpoints/c"])
def test_names_refuse_what_is_no_version(name: str) -> None:
    with pytest.raises(InvalidArgument, match="must be <dataset>/<version>"):
        names.version("p", name)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_refuse_what_is_no_dataset(name: str) -> None:
    with pytest.raises(InvalidArgument, match="must be <dataset>"):
        names.child("p", "datasets", name)
