"""`heldout fix`: only what is safe, into a new file, every change named; all other bytes as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import heldout
from heldout.errors import InvalidTrainingFile, InvalidValue
from heldout.pipeline.findings import FIXABLE
from heldout.pipeline.fix import Fixed, fix

SYSTEM = {"role": "system", "content": "Answer as JSON."}


def row(prompt: str, answer: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [SYSTEM, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **more}


def good(n: int) -> bytes:
    return json.dumps(row(f"Which queue is number {n}?", json.dumps({"queue": f"q{n % 3}"}))).encode()


GOOD = [good(n) for n in range(20)]


@pytest.fixture
def repaired(tmp_path: Path) -> Any:
    """Write the lines, repair them, and give what was done and the lines that came out."""

    def repaired(*lines: bytes, end: bytes = b"\n", **options: Any) -> tuple[Fixed, list[bytes]]:
        path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        path.write_bytes(end.join(lines) + end)
        fixed = fix(path, out, **options)
        assert path.read_bytes() == end.join(lines) + end, "the file itself is never changed"
        return fixed, out.read_bytes().split(b"\n")[:-1]

    return repaired


def test_a_sound_file_comes_out_byte_for_byte(repaired: Any) -> None:
    odd = b'  {"messages":[{"role":"user","content":"\\u00e9 or \xc3\xa9"} , {"content":"{ }","role":"assistant"}]}\t'
    fixed, lines = repaired(*GOOD, odd)
    assert lines == [*GOOD, odd]
    assert fixed.done == {}
    assert "nothing to repair" in " ".join(fixed.sentences())


def test_copies_are_left_out_and_the_first_stays(repaired: Any) -> None:
    other_spelling = json.dumps(json.loads(GOOD[3]), separators=(",", ":")).encode()
    shouted = GOOD[4].replace(b"Which", b"WHICH")
    masked = json.loads(GOOD[5])
    masked["messages"].insert(2, {"role": "assistant", "content": "a", "weight": 0})
    masked["messages"].insert(3, {"role": "user", "content": "b"})
    learned = json.loads(json.dumps(masked).replace('"weight": 0', '"weight": 1'))
    both = [json.dumps(one).encode() for one in (masked, learned)]
    fixed, lines = repaired(*GOOD, GOOD[3], other_spelling, shouted, *both)
    assert fixed.done == {"exact_duplicate": [21, 22]}
    assert lines == [*GOOD, shouted, *both], "other case may mean another thing, and other weights teach another"


def test_rows_with_tools_are_copies_only_byte_for_byte(repaired: Any) -> None:
    plain, tools = row("x", "{}"), row("x", "{}", tools=[{"type": "function"}])
    fixed, lines = repaired(*GOOD, json.dumps(plain).encode(), json.dumps(tools).encode())
    assert len(lines) == 22
    assert "exact_duplicate" not in fixed.done


@pytest.mark.parametrize("around", ["{} ", "\n{}", "{}\u200b", "\t{}\r\n", "\u00a0{}"])
def test_white_space_around_an_answer_goes_where_most_have_none(repaired: Any, around: str) -> None:
    answer = '{"queue": "q1"}'
    bad = json.dumps(row(f"odd {answer}", around.format(answer))).encode()
    fixed, lines = repaired(*GOOD, bad)
    assert fixed.done == {"answer_whitespace": [21]}
    assert lines == [*GOOD, json.dumps(row(f"odd {answer}", answer)).encode()]


def test_white_space_that_most_answers_have_stays(repaired: Any) -> None:
    spaced = [json.dumps(row(str(n), f" yes {n}")).encode() for n in range(12)]
    fixed, lines = repaired(*spaced, json.dumps(row("z", "no")).encode())
    assert not fixed.done
    assert len(lines) == 13


@pytest.mark.parametrize(
    "fenced", ["```json\n{}\n```", "```\n{}\n```", "`{}`", "~~~\n{}\n~~~", " ```json\n  {}\n```\n", "```JSON {}```"]
)
def test_a_code_fence_goes_where_most_answers_are_bare_json(repaired: Any, fenced: str) -> None:
    answer = '{"queue": "q1"}'
    fixed, lines = repaired(*GOOD, json.dumps(row("odd", fenced.format(answer))).encode())
    assert fixed.done == {"answer_code_fence": [21]}
    assert json.loads(lines[20])["messages"][2]["content"] == answer


@pytest.mark.parametrize("answer", ["```json\n{broken\n```", "```\nno JSON\n```", "see ```{}```", "```json\n7\n```"])
def test_a_fence_around_anything_else_stays(repaired: Any, answer: str) -> None:
    fixed, lines = repaired(*GOOD, json.dumps(row("odd", answer)).encode())
    assert not fixed.done
    assert len(lines) == 21


def test_code_fences_stay_where_answers_are_no_json(repaired: Any) -> None:
    code = [json.dumps(row(str(n), f"```python\nprint({n})\n```")).encode() for n in range(12)]
    fixed, lines = repaired(*code, json.dumps(row("z", '```json\n{"a": 1}\n```')).encode())
    assert not fixed.done
    assert lines[:12] == code


def test_a_changed_line_keeps_every_other_byte(repaired: Any) -> None:
    line = (
        '{"id" :1.50, "messages":[{"role":"user","content":"é \\u00e9 \\/"},'
        '{"role":"assistant","content":"{\\"q\\":\\"ü\\"}\\n" , "weight":1}]}'
    )
    fixed, lines = repaired(*GOOD, line.encode())
    assert fixed.done == {"answer_whitespace": [21]}
    assert lines[20].decode() == line.replace('}\\n"', '}"')


def test_the_answer_is_exchanged_and_not_the_same_text_in_the_question(repaired: Any) -> None:
    line = '{"messages" :[{"role":"user","content":"{\\"q\\": 1} "}, {"role":"assistant","content":"{\\"q\\": 1} "} ]}'
    _, lines = repaired(*GOOD, line.encode())
    assert lines[20].decode() == line.replace('1} "} ]', '1}"} ]')


def test_a_text_that_is_spelled_unusually_is_written_anew_in_the_lines_own_style(repaired: Any) -> None:
    line = '{"messages":[{"role":"user","content":"é"},{"role":"assistant","content":"{\\u0022q\\u0022: 1}\\n"}]}'
    _, lines = repaired(*GOOD, line.encode())
    assert lines[20].decode() == (
        '{"messages":[{"role":"user","content":"é"},{"role":"assistant","content":"{\\"q\\": 1}"}]}'
    )


def test_byte_order_mark_line_ends_and_blank_lines_go(repaired: Any) -> None:
    fixed, lines = repaired(b"\xef\xbb\xbf" + GOOD[0], b"", *GOOD[1:], b" \t", end=b"\r\n")
    assert lines == GOOD
    assert fixed.done == {"byte_order_mark": [1], "crlf_line_ends": [1, *range(3, 22)], "blank_line": [2, 22]}
    assert (fixed.lines, fixed.kept) == (22, 20)


def test_a_missing_line_feed_at_the_end_stays_missing(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    fix(path, out)
    assert out.read_bytes() == b"\n".join(GOOD)


def test_broken_lines_are_copied_as_they_are_and_named(repaired: Any) -> None:
    broken = [b'{"messages": [', b'{"messages": "\xff"}', b'{"messages": [], "messages": []}', b"7"]
    fixed, lines = repaired(*GOOD, *broken, *broken)
    assert lines == [*GOOD, *broken, *broken]
    assert {line for finding in fixed.left for line in finding.lines} == set(range(21, 29))
    assert sum("not repaired" in sentence for sentence in fixed.sentences()) == len(fixed.left)


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08rest", b"%PDF-1.7", b"[\n{}]", b"", "x".encode("utf-16")])
def test_another_kind_of_file_is_refused_and_nothing_is_written(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InvalidTrainingFile, match="Nothing was written"):
        fix(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"\n".join([*GOOD, GOOD[0]]))
    out.write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(path)
    for target in (path, tmp_path / "link.jsonl"):
        with pytest.raises(InvalidValue, match="never overwritten"):
            fix(path, target, force=True)
    with pytest.raises(InvalidValue, match="--force"):
        fix(path, out)
    with pytest.raises(InvalidValue, match="--force"):
        fix(path, tmp_path / "c.jsonl", changes=out)
    assert out.read_text() == "mine"
    fix(path, out, force=True)
    assert out.read_bytes() == b"\n".join(GOOD) + b"\n"
    with pytest.raises(InvalidValue, match="cannot write"):
        fix(path, tmp_path / "none" / "c.jsonl")


def test_the_list_has_every_change_with_its_line(tmp_path: Path) -> None:
    path, listed = tmp_path / "a.jsonl", tmp_path / "changes.jsonl"
    spaced = json.dumps(row("odd", '{"queue": "q1"} ')).encode()
    path.write_bytes(b"\n".join([*GOOD, b"", GOOD[7], spaced]) + b"\n")
    fix(path, tmp_path / "b.jsonl", changes=listed)
    assert [json.loads(line) for line in listed.read_text().splitlines()] == [
        {"code": "blank_line", "action": "removed", "line": 21},
        {"code": "exact_duplicate", "action": "removed", "line": 22, "of": 8},
        {
            "code": "answer_whitespace",
            "action": "changed",
            "line": 23,
            "before": '{"queue": "q1"} ',
            "after": '{"queue": "q1"}',
        },
    ]


def test_a_repaired_file_has_none_of_these_findings_left(repaired: Any, tmp_path: Path) -> None:
    fenced = json.dumps(row("fenced", '```json\n{"queue": "q1"}\n``` ')).encode()
    bare = json.dumps(row("fenced", '{"queue": "q1"}')).encode()
    repaired(b"\xef\xbb\xbf" + GOOD[0], GOOD[0], b"", *GOOD[1:], fenced, bare, b'{"a": 1', end=b"\r\n")
    codes = {one.code for one in heldout.check(tmp_path / "out.jsonl").findings}
    assert "truncated_json" in codes, "what is not safe stays"
    assert not codes & set(FIXABLE)
    again = fix(tmp_path / "out.jsonl", tmp_path / "again.jsonl")
    assert not again.done


def test_a_long_line_is_copied_in_pieces(repaired: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heldout.pipeline.fix.MAX_LINE_BYTES", 1000)
    long = b'{"messages": [' + b"x" * 5000
    fixed, lines = repaired(*GOOD[:10], long, *GOOD[10:], GOOD[0])
    assert lines == [*GOOD[:10], long, *GOOD[10:]]
    assert fixed.done == {"exact_duplicate": [22]}
    assert fixed.lines == 22
