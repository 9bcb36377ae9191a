"""`heldout fix`: repairs that cannot change what is meant, into a new file, every one of them listed.

The file is read three times and never kept: once by the reader, whose word on each line counts, once through
its answers to learn their usual form, once line by line to write. Untouched lines are copied byte for byte.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from heldout.errors import InvalidTrainingFile, InvalidValue
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.findings import place
from heldout.pipeline.types import Dataset, Example, Finding

_BOM = b"\xef\xbb\xbf"
_FENCED = re.compile(r"\s*(`{3,}|~{3,}|`)[ \t]*(?:json|JSON|jsonc|javascript|js)?\s*(.*?)\s*\1\s*", re.DOTALL)
_ZERO_WIDTH = "\u200b\u2060\ufeff\u180e\xad"
_MORE_THAN_MESSAGES = (b'"tools"', b'"functions"', b'"tool_calls"', b'"function_call"')

#: Longer lines, which no model reads, are copied in pieces.
MAX_LINE_BYTES = 32 << 20

#: code -> what was done, for one line and for many.
_WORDS = {
    "byte_order_mark": "byte order mark removed",
    "crlf_line_ends": "line end CR LF written as LF",
    "blank_line": "blank line left out",
    "exact_duplicate": "copy of an earlier row left out",
    "answer_code_fence": "code fence around a JSON answer removed",
    "answer_whitespace": "white space around an answer removed",
}
REMOVED, CHANGED = "removed", "changed"
PLACES = 12


class Change(NamedTuple):
    """One thing that was done to one line of the file as it was given."""

    code: str
    action: str  # removed or changed
    line: int
    of: int | None = None  # for a copy: the line that stays
    before: str | None = None
    after: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Without what there is none of."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What `fix` did. Lines are those of the file as it was given."""

    file: str
    out: str
    lines: int  # of the file
    kept: int  # written to `out`
    done: dict[str, list[int]] = field(default_factory=dict)  # code -> lines
    left: tuple[Finding, ...] = ()  # errors that only their author can correct

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `heldout fix --json`."""
        return {
            "file": self.file,
            "out": self.out,
            "lines": self.lines,
            "kept": self.kept,
            "changes": [{"code": code, "what": _WORDS[code], "lines": lines} for code, lines in self.done.items()],
            "left": [finding.as_dict() for finding in self.left],
        }

    def sentences(self) -> Iterator[str]:
        """For people: what was done, what was left, how much was written."""
        for code, lines in self.done.items():
            times = "" if len(lines) == 1 else f", {len(lines):,} times"
            yield f"{code}: {_WORDS[code]}{times} ({place(lines, at_most=PLACES)})"
        for finding in self.left:
            where = f" ({place(finding.lines, at_most=PLACES)})" if finding.lines else ""
            yield f"not repaired: {finding.code}{where}. {finding.message}"
        if not self.done:
            yield "There was nothing to repair."
        yield f"{self.out}: {self.kept:,} of {self.lines:,} lines. {self.file} is as it was."


def fix(file: Path, out: Path, *, changes: Path | None = None, force: bool = False) -> Fixed:
    """Write `file` to `out` with what is safe to repair repaired, and each change to `changes` as JSON lines.

    `out` appears when it is complete. Raises InvalidValue when a file would be overwritten (`force` allows it,
    but never for `file` itself), InvalidTrainingFile when `file` has no lines of JSON.
    """
    _refuse_overwriting(file, out, changes, force)
    with file.open("rb") as content:
        dataset, findings = read_dataset(content, name=str(file))
    left = tuple(one for one in findings if one.severity == "error")
    for finding in left:
        if not finding.lines:  # about the file as a whole: another format, nothing in it
            raise InvalidTrainingFile(f"{finding.message} Nothing was written.")
    repair = _Repair(dataset, left)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(file.open("rb"))
        written = stack.enter_context(_whole(out))
        listed = stack.enter_context(_whole(changes)) if changes else None
        for raw, done in repair.lines(source):
            written.write(raw)
            for change in done:
                if listed:
                    listed.write(json.dumps(change.as_dict(), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    return Fixed(file=str(file), out=str(out), lines=repair.seen, kept=repair.kept, done=repair.done, left=left)


def _refuse_overwriting(file: Path, out: Path, changes: Path | None, force: bool) -> None:
    if not file.is_file():
        raise InvalidValue(f"There is no file {file}")
    for one in filter(None, (out, changes)):
        if one.exists() and one.samefile(file):
            raise InvalidValue(f"{one} is the file to repair, which is never overwritten; choose another name")
        if one.exists() and not force:
            raise InvalidValue(f"{one} exists; choose another name, or --force to replace it")
    if changes and changes.resolve() == out.resolve():
        raise InvalidValue(f"{out} cannot be both the repaired file and the list of changes")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when everything is in it."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".fix-")
    except OSError as error:
        raise InvalidValue(f"cannot write to {path.parent}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as content:
            yield content
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Repair:
    """Goes through the lines of one file; afterwards `seen`, `kept` and `done` say what happened."""

    def __init__(self, dataset: Dataset, left: Iterable[Finding]) -> None:
        self._dataset = dataset
        self._broken = {line for finding in left for line in finding.lines}
        self._rows: dict[bytes, int] = {}  # what a row teaches -> the first line that does
        self._trim, self._bare = _usual_form(dataset.examples)
        self.seen = self.kept = 0
        self.done: dict[str, list[int]] = {}

    def lines(self, source: BinaryIO) -> Iterator[tuple[bytes, list[Change]]]:
        """What to write for each line of the file, and what was done to it."""
        sound = iter(self._dataset.examples)
        example = next(sound, None)
        for line, raw in _numbered(source):
            if line is None:
                yield raw, []
                continue
            found, changes = self._bytes(raw, line)
            if example is not None and example.line == line:
                if found and line not in self._broken:
                    found, more = self._row(found, example)
                    changes += more
                example = next(sound, None)
            self.seen += 1
            self.kept += bool(found)
            for change in changes:
                self.done.setdefault(change.code, []).append(line)
            yield found, changes

    def _bytes(self, raw: bytes, line: int) -> tuple[bytes, list[Change]]:
        """What needs no look at the row. A broken line keeps its bytes; how it ends is not part of it."""
        changes = []
        if line == 1 and raw.startswith(_BOM):
            raw = raw.removeprefix(_BOM)
            changes.append(Change("byte_order_mark", CHANGED, line))
        if not raw.strip():
            return b"", [*changes, Change("blank_line", REMOVED, line)]
        if raw.endswith(b"\r\n"):
            raw = raw[:-2] + b"\n"
            changes.append(Change("crlf_line_ends", CHANGED, line))
        return raw, changes

    def _row(self, raw: bytes, example: Example) -> tuple[bytes, list[Change]]:
        last = len(example.messages) - 1
        new = {
            index: repaired
            for index, message in enumerate(example.messages)
            if (example.weights[index] or index == last) and (repaired := self._answer(message["content"]))[1]
        }
        messages = [
            {**message, "content": new[index][0]} if index in new else message
            for index, message in enumerate(example.messages)
        ]
        first = self._rows.setdefault(_taught(messages, example, raw), example.line)
        if first != example.line:
            return b"", [Change("exact_duplicate", REMOVED, example.line, of=first)]
        if not new:
            return raw, []
        written = _rewrite(raw, {index: text for index, (text, _) in new.items()})
        changes = [
            Change(code, CHANGED, example.line, before=example.messages[index]["content"], after=text)
            for index, (text, codes) in new.items()
            for code in codes
        ]
        return (raw, []) if written is None else (written, changes)

    def _answer(self, text: str) -> tuple[str, list[str]]:
        """The answer in the file's usual form, and the codes of what that took."""
        codes = []
        if self._bare and (fenced := _FENCED.fullmatch(text)) and _is_json(fenced[2]):
            text = fenced[2]
            codes.append("answer_code_fence")
        trimmed = _trimmed(text)
        if self._trim and trimmed not in (text, ""):
            text = trimmed
            codes.append("answer_whitespace")
        return text, codes


def _usual_form(examples: Iterable[Example]) -> tuple[bool, bool]:
    """Whether more than half of the answers have no white space around, and whether more than half are JSON."""
    n = trimmed = bare = 0
    for example in examples:
        n += 1
        trimmed += example.target == _trimmed(example.target)
        bare += _is_json(example.target)
    return 2 * trimmed > n, 2 * bare > n


def _is_json(text: str) -> bool:
    """True of a JSON object or array, with nothing but white space around it."""
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _trimmed(text: str) -> str:
    """Without white space, and characters that nobody sees, at its ends."""
    while (shorter := text.strip().strip(_ZERO_WIDTH)) != text:
        text = shorter
    return text


def _taught(messages: list[dict[str, Any]], example: Example, raw: bytes) -> bytes:
    """Equal for rows of which one is enough: messages equal letter for letter but for Unicode composition and
    the spelling of JSON, and learned alike. Rows with more to them than messages must be equal byte for byte."""
    if b'"messages"' not in raw or any(mark in raw for mark in _MORE_THAN_MESSAGES):
        return hashlib.sha256(raw.strip()).digest()[:16]
    turns = [(message["role"], unicodedata.normalize("NFC", message["content"])) for message in messages]
    return hashlib.sha256(json.dumps([turns, example.weights]).encode()).digest()[:16]


def _numbered(source: BinaryIO) -> Iterator[tuple[int | None, bytes]]:
    """Lines with their numbers. What is beyond the first MAX_LINE_BYTES of one comes in pieces without."""
    line, whole = 0, True
    while raw := source.readline(MAX_LINE_BYTES):
        line += whole
        yield (line if whole else None), raw
        whole = raw.endswith(b"\n")


def _rewrite(raw: bytes, answers: dict[int, str]) -> bytes | None:
    """The line with these messages' texts, every other byte as it was where that can be done: the text's own
    literal is exchanged. Else the row is written anew in the line's own style. None when that cannot be done: a
    text in several parts, or rows of another form."""
    text = raw.decode("utf-8")
    end = text[len(text.rstrip("\r\n")) :]
    row = json.loads(text)
    if len(row.get("messages", ())) <= max(answers):
        return None  # preferences have their answers elsewhere
    wanted = copy.deepcopy(row)
    exchanged = text
    ascii_only = text.isascii()
    for index, answer in answers.items():
        old = _set_text(wanted["messages"][index], answer)
        if old is None:
            return None
        for literal in (json.dumps(old, ensure_ascii=False), json.dumps(old)):
            start = exchanged.rfind(literal)
            if start >= 0:
                new = json.dumps(answer, ensure_ascii=ascii_only)
                exchanged = exchanged[:start] + new + exchanged[start + len(literal) :]
                break
    if json.loads(exchanged) != wanted:
        comma, colon = (", " if '", "' in text or "}, {" in text else ","), (": " if '": ' in text else ":")
        exchanged = json.dumps(wanted, ensure_ascii=ascii_only, separators=(comma, colon)) + end
    return exchanged.encode()


def _set_text(message: dict[str, Any], text: str) -> str | None:
    """Put the text into the message; what was there, or None when it was no single text."""
    content = message["content"]
    if isinstance(content, list):
        if len(content) != 1:
            return None
        message, key = content[0], "text"
    else:
        key = "content"
    old = message[key]
    message[key] = text
    return str(old)
