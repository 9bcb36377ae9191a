"""Reading: every problem of every line, at once, and nothing lost in silence."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.types import Dataset, Finding

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside this checkout")

USER = {"role": "user", "content": "Where is my card?"}
ANSWER = {"role": "assistant", "content": "On its way."}


def row(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


GOOD = row(USER, ANSWER)


def read(*lines: bytes) -> tuple[Dataset, dict[str, Finding]]:
    dataset, findings = read_dataset(b"\n".join(lines) + b"\n", name="train.jsonl")
    by_code = {finding.code: finding for finding in findings}
    assert len(by_code) == len(findings), "one finding for each code"
    return dataset, by_code


def test_a_sound_file_becomes_examples_with_their_line_numbers():
    system = {"role": "system", "content": "Be brief."}
    dataset, findings = read(row(system, USER, ANSWER), GOOD)
    assert not findings
    assert dataset.name == "train.jsonl"
    assert [example.line for example in dataset.examples] == [1, 2]
    assert dataset.examples[0].messages == (system, USER, ANSWER)
    assert dataset.examples[0].weights == (0, 0, 1)
    assert dataset.examples[0].prompt == (system, USER)
    assert dataset.examples[0].target == "On its way."


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"messages": [', "truncated_json", "middle of its JSON"),
        (b'{"messages": [{"role": "us', "truncated_json", "Unterminated string"),
        (b'{"a": tru', "truncated_json", "middle"),
        (b'{"a": "\\u12', "truncated_json", "escape"),
        (b"{'messages': []}", "invalid_json", "character 1"),
        (b"text,label", "invalid_json", "this is not JSON: it begins with 'text,label'. Each line"),
        (b' "text","label"', "invalid_json", "a table (CSV) must be converted first"),
        (b"1,2", "invalid_json", "a table (CSV) must be converted first"),
        (b"},", "invalid_json", "character 0 (counted from 0), near '},'"),
        (b'{"a": NaN}', "invalid_json", "NaN is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid_json", "digits"),
        (b'{"a": "\x01"}', "invalid_json", "control character"),
        (GOOD + b",", "invalid_json", "Extra data"),
        (b"\xef\xbb\xbf" + GOOD, "invalid_json", "byte order mark"),
        (GOOD + b" " + GOOD, "several_objects_on_line", "its own line"),
        (b'{"a": "\xff"}', "invalid_utf8", "byte 7 of the line (counted from 0) is not UTF-8: FF"),
        (b"[" * 100_000, "nested_too_deeply", "nested"),
        (b'{"a":' * 100_000, "nested_too_deeply", "nested"),
        (b"17", "not_an_object", "a number"),
        (b'{"messages": "hi"}', "missing_messages", "a string"),
        (b'{"messages": []}', "missing_messages", "an empty list"),
        (b'{"message": []}', "missing_messages", "Rename"),
        (b'{"prompt": "a", "completion": "b"}', "missing_messages", "prompt/completion format"),
        (b'{"text": "a"}', "missing_messages", "keys found: 'text'"),
        (row(USER, "hi"), "not_an_object", "message 2 is a string"),
        (row({"content": "hi"}, ANSWER), "missing_field", "message 1 has no 'role'"),
        (row({"role": "user"}, ANSWER), "missing_field", "message 1 has no 'content'"),
        (row({"role": "User", "content": "hi"}, ANSWER), "unknown_role", "'User'"),
        (row({"role": ["user"], "content": "hi"}, ANSWER), "unknown_role", "a list"),
        (row({"role": "user", "content": 42}, ANSWER), "content_not_text", "message 1 has a number"),
        (row({"role": "user", "content": [{"type": "text"}]}, ANSWER), "content_not_text", "part 1"),
        (row({"role": "user", "content": ["hi"]}, ANSWER), "content_not_text", "a string"),
        (row({"role": "user", "content": " \n"}, ANSWER), "empty_user", "message 1"),
        (row({"role": "user", "content": []}, ANSWER), "empty_user", "message 1"),
        (row(USER, {"role": "assistant", "content": None}), "empty_assistant", "message 2"),
        (row(USER, {"role": "assistant", "content": "\ud83d"}), "lone_surrogate", "\\ud83d"),
        (row(USER, USER, ANSWER), "role_order", "message 2 has the role 'user', expected 'assistant'"),
        (row(ANSWER), "role_order", "message 1"),
        (row(USER, {"role": "system", "content": "x"}, ANSWER), "role_order", "message 2"),
        (row(USER), "last_not_assistant", "'user'"),
        (row({"role": "system", "content": "x"}), "last_not_assistant", "'system'"),
        (row(USER, {**ANSWER, "weight": 2}), "invalid_weight", "2, expected 0 or 1"),
        (row(USER, {**ANSWER, "weight": True}), "invalid_weight", "True"),
        (row(USER, {**ANSWER, "weight": 0.5}), "invalid_weight", "0.5"),
        (row({**USER, "weight": 1}, ANSWER), "misplaced_weight", "message 1"),
        (row(USER, {**ANSWER, "weight": 0}), "nothing_to_learn", "weight"),
        (row(USER, {**ANSWER, "audio": {"id": "a"}}), "unsupported_content", "text only"),
        (row({"role": "user", "content": [{"type": "input_audio"}]}, ANSWER), "unsupported_content", "'input_audio'"),
        (b'{"messages": [], "messages": []}', "duplicate_json_key", "'messages' occurs twice"),
    ],
)
def test_an_unsound_line_is_an_error_that_says_what_and_where(line: bytes, code: str, words: str):
    dataset, findings = read(GOOD, line, GOOD)
    assert [example.line for example in dataset.examples] == [1, 3]
    assert findings[code].severity == "error"
    assert findings[code].lines == (2,)
    assert findings[code].message.startswith("Line 2: ")
    assert words in findings[code].message


def test_one_problem_is_reported_once_and_no_others_with_it():
    for line in (row(USER), row(USER, {"role": "assistant", "audio": {"id": "a"}}), row(USER, USER, ANSWER)):
        assert len(read(line)[1]) == 1


def test_all_problems_of_a_line_are_reported():
    line = row({"role": "user", "content": ""}, {"role": "assistant", "content": None, "weight": 7}, USER)
    assert set(read(line)[1]) == {"empty_user", "empty_assistant", "invalid_weight", "last_not_assistant"}


def test_a_problem_of_many_lines_is_one_finding_with_all_lines():
    bad = row({"role": "user", "content": 42}, {"role": "assistant", "content": 43})
    _, findings = read(bad, GOOD, bad, b"", bad)
    assert findings["content_not_text"].lines == (1, 3, 5)
    assert "Line 1: message 1" in findings["content_not_text"].message
    assert "Also on lines 3 and 5." in findings["content_not_text"].message


def test_errors_come_before_warnings_before_notes():
    _, findings = read(row({**USER, "name": "kim"}, ANSWER), b"", row(USER))
    assert [finding.severity for finding in findings.values()] == ["error", "warning", "note"]


def test_blank_lines_are_counted_and_only_warned_about():
    dataset, findings = read(GOOD, b"", b" \t\r", GOOD)
    assert [example.line for example in dataset.examples] == [1, 4]
    assert findings["blank_line"].severity == "warning"
    assert findings["blank_line"].lines == (2, 3)


def noted(content: bytes) -> list[tuple[str, str]]:
    """(code, severity) of the findings about a file of two sound rows."""
    dataset, findings = read_dataset(content, name="a")
    assert [example.line for example in dataset.examples] == [1, 2]
    assert dataset.examples[0].messages == dataset.examples[1].messages == (USER, ANSWER)
    return [(finding.code, finding.severity) for finding in findings]


def test_line_ends_of_windows_and_a_missing_last_one_are_noted_and_lose_nothing():
    assert noted(GOOD + b"\r\n" + GOOD + b"\r\n") == [("crlf_line_ends", "note")]
    assert noted(GOOD + b"\n" + GOOD) == [("no_final_newline", "note")]
    assert noted(GOOD + b"\n" + GOOD + b"\n") == []


def test_a_utf8_byte_order_mark_is_tolerated_with_a_note():
    assert noted(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n") == [("byte_order_mark", "note")]


def test_every_rejected_byte_is_named_by_its_place_in_the_line_and_in_the_file():
    bad = GOOD.replace(b"card", b"\x92ard")
    at = bad.index(b"\x92")
    (finding,) = read_dataset(b"\n".join([bad, GOOD, bad, bad, b""]), name="a")[1]
    third = 2 * len(GOOD) + 2
    assert f"Line 1: byte {at} of the line (counted from 0) is not UTF-8: 92. It is byte {at} of" in finding.message
    assert f"line 3 (byte {at}, of the file {third + at}) and line 4 (byte {at}, of the" in finding.message
    assert r"my \x92ard" in finding.example


def test_a_byte_order_mark_counts_as_bytes_of_its_line():
    content = b"\xef\xbb\xbf" + GOOD.replace(b"card", b"\xffard") + b"\n"
    finding = read_dataset(content, name="a")[1][0]
    place = content.index(b"\xff")
    assert f"byte {place} of the line" in finding.message
    assert f"byte {place} of the file" in finding.message


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (gzip.compress(GOOD), "not_a_text_file", "gzip"),
        (b"%PDF-1.7\n" * 50, "not_a_text_file", "PDF"),
        (b"PK\x03\x04" + bytes(100), "not_a_text_file", "ZIP"),
        (hashlib.shake_128(b"x").digest(20_000), "not_a_text_file", "binary"),
        (("\n".join([GOOD.decode()] * 20)).encode("utf-16"), "wrong_encoding", "UTF-16"),
        (("\n".join([GOOD.decode()] * 20)).encode("utf-16-le"), "wrong_encoding", "UTF-16"),
        (json.dumps([json.loads(GOOD)] * 20, indent=2).encode(), "not_json_lines", "one JSON array"),
        (json.dumps(json.loads(GOOD), indent=2).encode(), "not_json_lines", "several lines"),
        (b"", "empty_file", "no examples"),
        (b"\n \r\n\t\n", "empty_file", "3 blank lines"),
        (b"[" + GOOD + b", " + GOOD + b"]", "not_json_lines", "one JSON array"),
        (b"[" + GOOD + b",\n" + GOOD + b"]\n", "not_json_lines", "one JSON array"),
        (b"[" + b",".join([GOOD] * 30_000) + b"]\n", "not_json_lines", "one JSON array"),
        (GOOD + b"\r" + GOOD + b"\r", "cr_line_ends", "line feeds"),
        (bytes(5000), "not_a_text_file", "NUL bytes"),
        (b"PAR1" + bytes(100), "not_a_text_file", "Parquet"),
        (b"a" * 257 + b"ustar", "not_a_text_file", "tar archive"),
    ],
)
def test_another_kind_of_file_is_one_clear_finding(content: bytes, code: str, words: str):
    dataset, findings = read_dataset(content, name="train.jsonl")
    assert len(dataset) == 0
    assert [(finding.code, finding.severity) for finding in findings] == [(code, "error")]
    assert words in findings[0].message
    assert findings[0].message.startswith("train.jsonl: ")


def test_a_stream_reads_like_bytes_whatever_its_length():
    lines = [row(USER, {"role": "assistant", "content": "x" * n}) for n in range(1, 400)]
    content = b"\n".join(lines)
    assert read_dataset(io.BytesIO(content), name="a") == read_dataset(content, name="a")
    assert len(read_dataset(content, name="a")[0]) == 399


@pytest.mark.parametrize(
    ("group", "read_as"),
    [("kim", "kim"), (7, "7"), (0, "0"), (1.5, "1.5"), (" kim\n", "kim"), ("", None), (None, None)],
)
def test_a_declared_group_is_read(group: Any, read_as: str | None):
    dataset, findings = read(row(USER, ANSWER, metadata={"group": group, "source": "x"}))
    assert dataset.examples[0].group == read_as
    assert not findings


@pytest.mark.parametrize(("group", "words"), [(True, "true or false"), (["a"], "a list"), ({"id": 1}, "an object")])
def test_a_group_of_another_type_is_warned_about_and_ignored(group: Any, words: str):
    dataset, findings = read(row(USER, ANSWER, metadata={"group": group}))
    assert dataset.examples[0].group is None
    assert findings["invalid_group"].severity == "warning"
    assert words in findings["invalid_group"].message


def test_metadata_that_is_no_object_has_no_group():
    for metadata in ("group", ["group"], 7, None):
        dataset, findings = read(row(USER, ANSWER, metadata=metadata))
        assert dataset.examples[0].group is None
        assert not findings


def test_weights_are_honoured():
    messages = (USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, USER, ANSWER)
    dataset, findings = read(row(*messages))
    assert not findings
    assert dataset.examples[0].weights == (0, 0, 0, 1, 0, 1)


def test_a_last_answer_that_is_not_learned_is_warned_about():
    dataset, findings = read(row(USER, ANSWER, USER, {**ANSWER, "weight": 0}))
    assert findings["last_answer_not_learned"].severity == "warning"
    assert len(dataset) == 1


def test_text_parts_are_joined_and_a_developer_is_a_system():
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "my card?"}]
    line = row({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}, ANSWER)
    dataset, findings = read(line)
    assert not findings
    assert dataset.examples[0].messages == ({"role": "system", "content": "Be brief."}, USER, ANSWER)


def test_ignored_keys_are_listed_once_for_the_file():
    dataset, findings = read(
        row({**USER, "name": "kim", "mood": "bad"}, {**ANSWER, "refusal": None, "tool_calls": None}, id=1),
        row(USER, {**ANSWER, "cost": 3}, id=2, source="x", metadata={}, parallel_tool_calls=False, tools=[]),
    )
    assert len(dataset) == 2
    assert dataset.examples[0].messages == (USER, ANSWER)
    assert {code: finding.severity for code, finding in findings.items()} == {
        "unknown_key": "warning",
        "name_ignored": "note",
        "unknown_top_level_key": "note",
    }
    assert "'mood', 'cost'" in findings["unknown_key"].message
    assert "'id', 'source'" in findings["unknown_top_level_key"].message


def test_a_message_stays_short_whatever_the_line_holds():
    keys = {f"{n}{'k' * 1000}": n for n in range(100)}
    _, findings = read(json.dumps(keys).encode(), row({**USER, **keys}, ANSWER, **keys))
    assert all(len(finding.message) < 800 for finding in findings.values())


def test_half_a_character_never_gets_into_a_finding():
    half = "\ud83d"
    rows = [half, {half: 1}, {"messages": [{half: half}]}, {"messages": [{"role": half, "content": half}]}]
    rows += [{"messages": [USER, ANSWER], half: half, "metadata": {"group": [half]}}]
    _, findings = read_dataset(b"\n".join(json.dumps(row).encode() for row in rows), name="a")
    assert {"not_an_object", "missing_messages", "unknown_role", "invalid_group"} < {one.code for one in findings}
    for finding in findings:
        json.dumps(finding.as_dict(), ensure_ascii=False).encode("utf-8")


def dirty(name: str) -> tuple[dict[str, Any], dict[int, set[str]], Dataset]:
    """What is expected of a file, the codes found by line, and the dataset."""
    expected = json.loads((DATA / "dirty" / f"{name}.expected.json").read_text(encoding="utf-8"))
    dataset, findings = read_dataset((DATA / "dirty" / f"{name}.jsonl").read_bytes(), name=name)
    codes: dict[int, set[str]] = {}
    for finding in findings:
        for line in finding.lines:
            codes.setdefault(line, set()).add(finding.code)
    return expected, codes, dataset


@needs_data
def test_every_planted_defect_is_found_with_its_kind_and_no_other_line_is_flagged():
    expected, codes, dataset = dirty("broken_lines")
    for defect in expected["defects"]:
        allowed = {defect["kind"], *defect.get("also", ())}
        for line in defect["lines"]:
            assert defect["kind"] in codes[line]
            assert codes[line] <= allowed, f"line {line}"
    assert sorted(codes) == expected["lines_with_defects"]
    assert len(dataset) == expected["clean_line_count"]


@needs_data
@pytest.mark.parametrize("name", ["broken_lines", "mixed"])
def test_every_planted_byte_position_is_told(name: str):
    expected = json.loads((DATA / "dirty" / f"{name}.expected.json").read_text(encoding="utf-8"))
    _, findings = read_dataset((DATA / "dirty" / f"{name}.jsonl").read_bytes(), name=name)
    (finding,) = (finding for finding in findings if finding.code == "invalid_utf8")
    planted = [defect for defect in expected["defects"] if defect["kind"] == "invalid_utf8"]
    assert finding.lines == tuple(line for defect in planted for line in defect["lines"])
    first, *others = planted
    assert f"byte {first['byte_in_line']} of the line" in finding.message
    assert f"byte {first['byte_in_file']} of the file" in finding.message
    for defect in others:
        place = f"line {defect['lines'][0]} (byte {defect['byte_in_line']}, of the file {defect['byte_in_file']})"
        assert place in finding.message


@needs_data
def test_encoding_oddities_inside_texts_are_still_examples():
    expected, codes, dataset = dirty("encoding")
    assert not codes
    assert len(dataset) == expected["line_count"]
    _, findings = read_dataset((DATA / "dirty" / "encoding.jsonl").read_bytes(), name="a")
    assert {finding.code for finding in findings} == {planted["kind"] for planted in expected["file_level"]}
    assert all(finding.severity == "note" for finding in findings)


@needs_data
@pytest.mark.parametrize("path", sorted(DATA.glob("tasks/*/*.jsonl")), ids=lambda path: f"{path.parent.name}")
def test_clean_files_have_no_findings(path: Path):
    dataset, findings = read_dataset(path.read_bytes(), name=path.name)
    assert len(dataset) == path.read_bytes().count(b"\n")
    assert not findings


@needs_data
def test_unusual_but_valid_rows_are_accepted():
    dataset, findings = read_dataset((DATA / "dirty" / "control_unusual.jsonl").read_bytes(), name="a")
    assert len(dataset) == 15
    assert {finding.code: finding.severity for finding in findings} == {
        "name_ignored": "note",
        "no_final_newline": "note",
    }
