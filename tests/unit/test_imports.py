"""Nothing but training and serving in this process needs the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "sklearn", "scipy", "ray")


def run(program: str) -> str:
    path = f"import sys; sys.path[:] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-c", path + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "heldout",
        "heldout.cli",
        "heldout.processes.server",
        "heldout.processes.worker",
        "heldout.processes.job",
        "heldout.processes.judging",
        "heldout.api.app",
        "heldout.pipeline.run",
    ],
)
def test_starts_without_torch(module: str) -> None:
    # None in sys.modules makes any import of that name fail, with a trace that names the culprit.
    run(f"for name in {HEAVY!r}: sys.modules[name] = None\nimport {module}")


def test_the_package_alone_loads_neither_numpy_nor_rich() -> None:
    program = "before = set(sys.modules)\nimport heldout\nprint(*(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in run(program).split()}
    assert "heldout" in loaded
    assert not loaded & {"numpy", "rich", "pydantic", "sqlalchemy", "typer", *HEAVY}


def test_the_package_has_tune_and_says_what_it_has_not() -> None:
    import heldout

    assert heldout.__all__ == ["Endpoint", "advise", "check", "compare", "evaluate", "tune"]
    assert callable(heldout.check)
    assert callable(heldout.advise)
    with pytest.raises(AttributeError, match="'heldout' has no attribute 'tunes'"):
        _ = heldout.tunes
