"""The reader on any bytes whatever: what `tests/fuzz/promises.py` promises, and what is planted is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heldout.pipeline.dataset import read_dataset
from tests.fuzz.promises import check_promises

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())

#: Blocks smaller than a line, and lines longer than the longest, in files of a few hundred bytes.
SIZES = {"block": st.sampled_from([3, 4, 7, 64, 1 << 20]), "longest": st.sampled_from([20, 100, 16 << 20])}

TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "a\\", 'say "hi": now', "\ud83d", "\x00", "ä€", "e\u0301"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "bot"])


def sometimes(likely: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What belongs there, or now and then anything."""
    return st.one_of(likely, likely, likely, VALUES)


CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": sometimes(st.sampled_from(["c1", "c2"])),
        "type": sometimes(st.just("function")),
        "function": sometimes(
            st.fixed_dictionaries(
                {},
                optional={
                    "name": sometimes(st.sampled_from(["f", "g"])),
                    "arguments": sometimes(st.sampled_from(["{}", '{"a": 1}', '{"a": 1, "a": 2}', "[", "[" * 2000])),
                },
            )
        ),
    },
)
MESSAGES = st.fixed_dictionaries(
    {"role": sometimes(ROLES), "content": sometimes(TEXTS)},
    optional={
        "weight": sometimes(st.sampled_from([0, 1])),
        "name": VALUES,
        "tool_calls": sometimes(st.lists(CALLS, max_size=2)),
        "tool_call_id": sometimes(st.sampled_from(["c1", "c2"])),
        "function_call": VALUES,
    },
)
TOOLS = sometimes(
    st.just(
        [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}, "required": ["a"]}}}]
    )
)
CONVERSATIONS = sometimes(st.lists(sometimes(MESSAGES), max_size=5))
ROWS = st.one_of(
    st.fixed_dictionaries(
        {"messages": CONVERSATIONS},
        optional={"tools": TOOLS, "metadata": VALUES, "parallel_tool_calls": VALUES, "functions": VALUES},
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "input": sometimes(st.fixed_dictionaries({"messages": CONVERSATIONS}, optional={"tools": TOOLS})),
            "preferred_output": CONVERSATIONS,
            "non_preferred_output": CONVERSATIONS,
        },
    ),
    st.fixed_dictionaries(
        {"chosen": TEXTS | CONVERSATIONS, "rejected": TEXTS | CONVERSATIONS}, optional={"prompt": TEXTS | CONVERSATIONS}
    ),
    VALUES,
)
LINES = st.one_of(
    st.builds(
        lambda row, form: json.dumps(row, **form).encode(), ROWS, st.sampled_from([{}, {"separators": (",", ":")}])
    ),
    st.binary(max_size=30),
    st.sampled_from([b"", b" \t", b"\xef\xbb\xbf", b'{"messages": [], "messages": []}', b"[" * 2000]),
)
FILES = st.builds(
    lambda lines, end, closed: end.join(lines) + (end if closed else b""),
    st.lists(LINES, max_size=6),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
)


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200), **SIZES)
def test_any_bytes_are_read_without_a_crash(content: bytes, block: int, longest: int):
    check_promises(content, block=block, longest=longest)


@settings(deadline=None, max_examples=120)
@given(content=FILES, **SIZES)
def test_any_rows_are_kept_or_named_and_read_the_same_in_every_way(content: bytes, block: int, longest: int):
    check_promises(content, block=block, longest=longest)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_every_promise_holds_for_the_corpus_of_the_fuzzer(path: Path):
    content = path.read_bytes()[1:]
    for block in (3, 7, 1 << 20):
        check_promises(content, block=block)


@settings(deadline=None, max_examples=100)
@given(
    before=st.lists(st.text(max_size=20), max_size=4),
    text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20),
    bad=st.sampled_from([b"\xff", b"\x92", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5"]),
    end=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.booleans(),
)
def test_a_planted_byte_that_is_no_utf8_is_named_by_its_place(
    before: list[str], text: str, bad: bytes, end: bytes, mark: bool
):
    lines = [json.dumps(one).encode() for one in before]
    start = b'{"messages": [{"role": "user", "content": "' + json.dumps(text, ensure_ascii=False)[1:-1].encode()
    content = (b"\xef\xbb\xbf" if mark else b"") + end.join([*lines, start + bad + b'!"}]}', b""])
    place = content.index(start) + len(start)
    findings = read_dataset(content, name="a")[1]
    (finding,) = (finding for finding in findings if finding.code == "invalid_utf8")
    assert finding.lines == (len(before) + 1,)
    assert f"It is byte {place} of the file" in finding.message
    in_line = place - content.rfind(b"\n", 0, place) - 1
    assert f"byte {in_line} of the line" in finding.message
