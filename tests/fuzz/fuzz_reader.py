"""Coverage-guided fuzzing of the reader: no crash, no hang, every promise kept.

    python -m tests.fuzz.fuzz_reader [--minutes 60] [--work DIRECTORY]

from the root of the repository, with the extra `fuzz` installed (pip install -e '.[fuzz]'). It starts from
tests/fuzz/corpus, which stays as it is; what is found on the way is kept in the work directory. An input that
breaks a promise is written there as crash-…, one that takes longer than 10 s as timeout-…, and the exit code is
not 0. Put such an input, made small, into tests/unit/test_reader_properties.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["heldout.pipeline", "json"]):
    from tests.fuzz.promises import check_promises

CORPUS = Path(__file__).parent / "corpus"


def one_input(data: bytes) -> None:
    """The first byte chooses how small blocks and the longest line are; the rest is the file."""
    if not data:
        return
    how = data[0]
    block = 1 << 20 if how % 2 else 3 + how % 61
    longest = 1 + how if how % 16 == 3 else 16 << 20
    check_promises(data[1:], block=block, longest=longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--work", type=Path, help="where found inputs are kept; a temporary folder if not given")
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="fuzz-reader-"))
    found = work / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    print(f"Working in {work}", flush=True)
    options = [
        f"-max_total_time={int(asked.minutes * 60)}",
        f"-artifact_prefix={work}{os.sep}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=4096",
        "-print_final_stats=1",
        f"-dict={Path(__file__).parent / 'words.dict'}",
    ]
    # libFuzzer writes new inputs into the first folder and only reads the others.
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
