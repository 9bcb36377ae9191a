"""The bias measure on files with more and more planted bias."""

from __future__ import annotations

import pytest
from benchmarks.bias import FOLDER, taught, without_groups

from heldout.pipeline.consequences import bias


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared data are not here")
def test_the_bias_measure_rises_with_the_planted_bias_and_is_silent_without() -> None:
    found = {name: taught(name, "tfidf") for name in ("balanced", "skew75", "skew95")}
    declared = {name: bias.measure(subject) for name, subject in found.items()}
    amplified = [declared[name].numbers["bias_amp"] for name in found]
    assert amplified[0] == 0
    assert amplified == sorted(set(amplified)), "from balanced to skew75 to skew95"
    gaps = [bias.measure(without_groups(subject)).numbers["shift"] for subject in found.values()]
    apart = [abs(gap["male"] - gap["female"]) for gap in gaps]
    assert apart == sorted(set(apart)), "by swapped names as well"
    assert [declared[name].status for name in found] == ["ok", "ok", "warn"]
    assert bias.measure(without_groups(found["balanced"])).status == "ok"
