"""Profiles: one installation of the services by name, in a file of its user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from luthier.client.cli import main
from luthier.client.config import ConfigArguments, read_config
from luthier.client.profiles import config_path, read_profiles
from luthier.errors import InvalidArgument, NotFound, Unauthenticated

TEXT = """
default_profile = "laptop"

[profiles.laptop]
home = "{home}"
timeout_seconds = 5

[profiles.team]
project = "support"
data_address = "https://luthier.example.com:7601"
api_key_file = "{key}"
"""


@pytest.fixture
def environ(home: Path, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "luthier").mkdir()
    (tmp_path / "team.key").write_text("team-key\n")
    (tmp_path / "luthier" / "config.toml").write_text(TEXT.format(home=home, key=tmp_path / "team.key"))
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def written(tmp_path: Path, text: str) -> dict[str, str]:
    (file := tmp_path / "other.toml").write_text(text)
    return {"LUTHIER_CLIENT_CONFIG": str(file), "LUTHIER_CLIENT_API_KEY": "k"}


def test_the_default_profile_is_taken_by_itself(environ: dict[str, str]) -> None:
    config = read_config(ConfigArguments(), environ)
    assert (config.api_key, config.timeout_seconds, config.project) == ("test-key", 5.0, "default")


def test_a_profile_is_named_by_argument_or_environment(environ: dict[str, str]) -> None:
    for arguments, more in (
        (ConfigArguments(profile="team"), {}),
        (ConfigArguments(), {"LUTHIER_CLIENT_PROFILE": "team"}),
    ):
        config = read_config(arguments, environ | more)
        assert (config.api_key, config.project) == ("team-key", "support")
        assert config.data_address == "https://luthier.example.com:7601"
        assert config.training_address == "127.0.0.1:7602"


def test_the_environment_comes_before_a_profile_that_nobody_named_beside_it(environ: dict[str, str]) -> None:
    more = {
        "LUTHIER_CLIENT_PROFILE": "team",
        "LUTHIER_CLIENT_PROJECT": "other",
        "LUTHIER_DATA_ADDRESS": "127.0.0.1:1",
        "LUTHIER_CLIENT_API_KEY": "of-environ",
        "LUTHIER_CLIENT_TIMEOUT_SECONDS": "9",
    }
    config = read_config(ConfigArguments(), environ | more)
    assert (config.project, config.data_address, config.api_key) == ("other", "127.0.0.1:1", "of-environ")
    assert config.timeout_seconds == 9.0


def test_a_profile_that_an_argument_names_comes_before_the_environment(environ: dict[str, str]) -> None:
    """Else a key, or an address, of another installation would be used."""
    more = {
        "LUTHIER_CLIENT_PROJECT": "other",
        "LUTHIER_DATA_ADDRESS": "127.0.0.1:1",
        "LUTHIER_CLIENT_API_KEY": "of-environ",
        "LUTHIER_TRAINING_ADDRESS": "127.0.0.1:2",
    }
    config = read_config(ConfigArguments(profile="team"), environ | more)
    assert (config.project, config.api_key) == ("support", "team-key")
    assert config.data_address == "https://luthier.example.com:7601"
    assert config.training_address == "127.0.0.1:2", "of what it does not say the environment does"


def test_arguments_come_before_all(environ: dict[str, str], home: Path) -> None:
    said = ConfigArguments(profile="team", project="mine", timeout_seconds=1.0, home=home)
    config = read_config(said, environ)
    assert (config.project, config.timeout_seconds, config.api_key) == ("mine", 1.0, "test-key")
    assert read_config(ConfigArguments(profile="team", api_key="said"), environ).api_key == "said"


def test_a_profile_that_is_not_there_is_named_with_those_that_are(environ: dict[str, str]) -> None:
    with pytest.raises(NotFound, match=r"no profile 'teem' in .*config\.toml; there are: laptop, team"):
        read_config(ConfigArguments(profile="teem"), environ)


def test_without_a_file_there_are_none(tmp_path: Path) -> None:
    assert read_profiles({"XDG_CONFIG_HOME": str(tmp_path)}).by_name == {}
    with pytest.raises(InvalidArgument, match="LUTHIER_CLIENT_CONFIG must name a file"):
        read_profiles({"LUTHIER_CLIENT_CONFIG": str(tmp_path / "absent.toml")})


def test_the_file_is_where_the_environment_says() -> None:
    assert config_path({"LUTHIER_CLIENT_CONFIG": "/a/b.toml"}) == Path("/a/b.toml")
    assert config_path({"XDG_CONFIG_HOME": "/c"}) == Path("/c/luthier/config.toml")
    assert config_path({}) == Path("~/.config/luthier/config.toml").expanduser()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[profiles.a]\nprojekt = 'x'", "profiles.a: projekt is not known: did you mean project"),
        ("profile = 'a'", "profile is not known: did you mean profiles"),
        ("[profiles.a]\nproject = 3", "profiles.a.project must be a text, got 3"),
        ("[profiles.a]\nproject = ''", "profiles.a.project must be a text, got ''"),
        ("[profiles.a]\ntimeout_seconds = 'soon'", "profiles.a.timeout_seconds must be a number, got 'soon'"),
        (
            "[profiles.a]\napi_key = 'lk_secret'",
            "api_key does not belong here; name a file that holds the key",
        ),
        ("default_profile = 'b'\n[profiles.a]", r"default_profile must be one of \['a'\], got 'b'"),
        ("profiles = 3", "profiles must be tables"),
        ("[profiles]\na = 3", "profiles.a must be a table"),
        ("[[", "must be a readable file of TOML"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as caught:
        read_config(ConfigArguments(), written(tmp_path, text))
    assert "lk_secret" not in str(caught.value)


def test_a_profile_whose_time_is_none_is_refused(tmp_path: Path) -> None:
    environ = written(tmp_path, "default_profile = 'a'\n[profiles.a]\ntimeout_seconds = 0")
    with pytest.raises(InvalidArgument, match="timeout_seconds must be a number of seconds above 0"):
        read_config(ConfigArguments(), environ)


def test_a_key_file_that_is_not_there_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "team.key").unlink()
    with pytest.raises(Unauthenticated, match=r"team\.key"):
        read_config(ConfigArguments(profile="team"), environ)


Run = Callable[..., Result]


def test_the_command_shows_them(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LUTHIER_CLIENT_PROFILE", "LUTHIER_CLIENT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", environ["XDG_CONFIG_HOME"])
    shown = CliRunner().invoke(main, ["profiles"])
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[1][:2] == ["*", "laptop"]
    assert lines[2] == ["team", "support", "data", "https://luthier.example.com:7601"]
    assert CliRunner().invoke(main, ["profiles", "-o", "name"]).stdout == "laptop\nteam\n"
    said = json.loads(CliRunner().invoke(main, ["profiles", "--json"]).stdout)
    assert (said["taken"], said["profiles"]["team"]["project"]) == ("laptop", "support")
    refused = CliRunner().invoke(main, ["--profile", "nobody", "jobs", "list"])
    assert refused.exit_code == 3
    assert "no profile 'nobody'" in refused.stderr
