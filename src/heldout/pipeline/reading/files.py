"""What kind of file this is, when it is none with lines of JSON: one sentence instead of thousands."""

from __future__ import annotations

import re

from heldout.pipeline.reading.lines import UTF8_BOM
from heldout.pipeline.reading.problems import Problem

#: So much of a file tells its kind.
_SAMPLE_BYTES = 4096

#: First bytes of files that people upload by mistake.
_MAGIC = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PK\x03\x04": "a ZIP archive or an Office document",
    b"PK\x05\x06": "an empty ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"%PDF": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x04\x95": "a Python pickle",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"<?xml": "an XML document",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257
_CONTROL_BYTES = bytes(set(range(0x20)) - set(b"\t\n\v\f\r"))


def not_json_lines(head: bytes) -> Problem | None:
    """Why the file that begins with `head` cannot be read line by line. `head` is a megabyte, or all there is."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return _not_text(f"is {what}")
    if head[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        return _not_text("is a tar archive")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem("wrong_encoding", "the file is UTF-16 or UTF-32. Save it as UTF-8")
    sample = head[:_SAMPLE_BYTES]
    if sample and not sample.strip(b"\x00"):
        return _not_text("starts with nothing but NUL bytes, as after an unfinished copy")
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    # A stray control character is a problem of its line; one byte in twenty is another kind of file.
    if controls >= 8 and controls * 20 > len(sample):
        if sample.count(0) * 3 > len(sample):
            return Problem("wrong_encoding", "the file looks like UTF-16 or UTF-32. Save it as UTF-8")
        return _not_text("is binary")
    return _one_line(head) or _one_json_document(head)


def _not_text(what: str) -> Problem:
    return Problem("not_a_text_file", f"the file {what}. Upload the JSONL text itself, as UTF-8")


def _one_line(head: bytes) -> Problem | None:
    """A file whose lines end with a carriage return alone is one line to everybody else."""
    if b"\n" in head or re.search(rb"\}\r\s*\{", head) is None:
        return None
    return Problem("cr_line_ends", "the lines end with CR alone. Save the file with line feeds (LF) at the line ends")


def _one_json_document(head: bytes) -> Problem | None:
    text = head.removeprefix(UTF8_BOM)
    lines = [line for line in (line.strip() for line in text[:_SAMPLE_BYTES].splitlines()) if line]
    if not lines:
        return None
    first, _, others = text.lstrip().partition(b"\n")
    first = first.rstrip()
    is_array = first == b"[" or re.match(rb"\[\s*\{", first) is not None
    # A complete array on the first of several lines is a wrong line in a file of lines.
    is_array = is_array and (first in (b"[", b"[{") or first.endswith(b",") or not others.strip())
    is_object = len(lines) > 1 and lines[0] == b"{" and not lines[1].startswith(b"{")
    if not (is_array or is_object):
        return None
    return Problem(
        "not_json_lines",
        f"the file is {'one JSON array' if is_array else 'JSON spread over several lines'}. "
        "JSON Lines has one complete object on each line, with no brackets around and no commas between them",
    )
