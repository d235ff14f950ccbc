"""Where the Training service reads base models from: never among keys and state."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import InvalidArgument
from luthier.runtime.config import read
from luthier.storage.local_urls import BLOBS, DATABASES
from luthier.training.config import Config
from luthier.training.model_roots import roots_of


def config(home: Path, *roots: Path | str) -> Config:
    environ = {"LUTHIER_HOME": str(home), "LUTHIER_TRAINING_MODEL_ROOTS": ",".join(map(str, roots))}
    return read(Config, section="TRAINING", environ=environ)


def roots(home: Path, *named: Path) -> tuple[Path, ...]:
    return roots_of(home, config(home, *named).model_roots, variable="V")


def test_models_are_read_from_a_folder_of_their_own(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert roots(home) == (home / "models",)
    (home / "models").mkdir(parents=True)
    (tmp_path / "large-disk").mkdir()
    assert roots(home, tmp_path / "large-disk", home / "models" / "team") == (
        tmp_path / "large-disk",
        home / "models" / "team",
    )
    (home / "models").rmdir()
    (home / "models").symlink_to(tmp_path / "large-disk")
    assert roots(home) == (home / "models",)


@pytest.mark.parametrize("root", ["{home}", "{home}/..", "/", "{home}/blobs", "{home}/models/..", "{door}"])
def test_a_root_that_holds_keys_or_state_is_refused(tmp_path: Path, root: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "door").symlink_to(home)
    named = root.format(home=home, door=tmp_path / "door")
    with pytest.raises(InvalidArgument, match="LUTHIER_TRAINING_MODEL_ROOTS must name folders") as caught:
        config(home, named)
    assert f"got {Path(named)}; put models into {home / 'models'}" in caught.value.message


@pytest.mark.parametrize("setting", ["DATABASE_URL", "BLOBS_URL"])
@pytest.mark.parametrize("root", ["{disk}", "/", "{state}", "{state}/in", "{door}"])
def test_a_root_that_holds_state_outside_of_the_home_is_refused(
    tmp_path: Path, root: str, setting: str
) -> None:
    state = tmp_path / "disk" / "luthier"
    state.mkdir(parents=True)
    (tmp_path / "door").symlink_to(tmp_path / "disk")
    urls = DATABASES if setting == "DATABASE_URL" else BLOBS
    environ = {
        "LUTHIER_HOME": str(tmp_path / "home"),
        f"LUTHIER_TRAINING_{setting}": urls.of(state),
        "LUTHIER_TRAINING_MODEL_ROOTS": root.format(
            disk=tmp_path / "disk", state=state, door=tmp_path / "door"
        ),
    }
    with pytest.raises(InvalidArgument, match="LUTHIER_TRAINING_MODEL_ROOTS must name folders"):
        read(Config, section="TRAINING", environ=environ)
    beside = {**environ, "LUTHIER_TRAINING_MODEL_ROOTS": str(tmp_path / "disk" / "models")}
    assert read(Config, section="TRAINING", environ=beside).model_roots == (
        str(tmp_path / "disk" / "models"),
    )


def test_a_folder_of_models_that_leads_among_state_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "blobs").mkdir(parents=True)
    (home / "models").symlink_to(home / "blobs")
    with pytest.raises(InvalidArgument, match="nothing of the home's keys"):
        config(home)


def test_reward_services_are_those_of_this_machine_unless_set_otherwise(tmp_path: Path) -> None:
    assert config(tmp_path).reward_addresses == ("localhost", "127.0.0.1", "[::1]")
    environ = {"LUTHIER_HOME": str(tmp_path), "LUTHIER_REWARD_ADDRESSES": "rewards.example:50051"}
    assert read(Config, section="TRAINING", environ=environ).reward_addresses == ("rewards.example:50051",)
