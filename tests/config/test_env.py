"""What the launcher says in the environment."""

import pytest

from weft.config import env
from weft.config.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WEFT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def test_alone() -> None:
    assert (env.rank(), env.world_size(), env.local_rank(), env.wants_traceback()) == (0, 1, 0, False)


def test_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "WEFT_TRACEBACK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (env.rank(), env.world_size(), env.local_rank(), env.wants_traceback()) == (5, 8, 1, True)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 is outside WORLD_SIZE = 8"):
        env.rank()
    monkeypatch.setenv("RANK", "-1")
    with pytest.raises(
        ConfigError, match="RANK: expected a whole number of at least 0 in the environment, not '-1'"
    ):
        env.rank()
