"""The gate's one decision: setting, verdict and release to open, warn or block."""

from __future__ import annotations

import pytest

from heldout.errors import InvalidValue
from heldout.gate import Decision, decide
from heldout.settings import read_settings

RELEASE = {"reason": "accepted", "released_at": 1}


@pytest.mark.parametrize("outcome", ["dont_ship", "inconclusive", "an outcome of a later version"])
def test_whatever_is_not_ship_is_held_back_as_the_setting_says(outcome: str) -> None:
    verdict = {"outcome": outcome}
    decisions = {setting: decide(setting, verdict, None) for setting in ("off", "warn", "block")}
    assert decisions == {"off": Decision.OPEN, "warn": Decision.WARN, "block": Decision.BLOCK}


@pytest.mark.parametrize("setting", ["off", "warn", "block"])
def test_ship_no_verdict_and_a_release_open_the_gate(setting: str) -> None:
    assert decide(setting, {"outcome": "ship"}, None) is Decision.OPEN
    assert decide(setting, None, None) is Decision.OPEN
    assert decide(setting, {"outcome": "dont_ship"}, RELEASE) is Decision.OPEN


def test_an_unknown_setting_is_refused_by_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELDOUT_GATE", "closed")
    with pytest.raises(InvalidValue, match=r"HELDOUT_GATE: .*'off', 'warn' or 'block'"):
        read_settings()
    monkeypatch.delenv("HELDOUT_GATE")
    assert read_settings().gate == "warn"
