"""How well `heldout check` finds what is planted in the dirty files, how quiet it is on clean ones, how fast it is.

    .venv/bin/python benchmarks/checks.py [--encoder] [--only mixed duplicates] [--list]
    .venv/bin/python benchmarks/checks.py --speed [--rows 10000 100000] [--huge]

Scored by line first, by kind second, as the README of the data says. A planted defect is *found* when a finding
with its name (or a name that is right too) has all of its lines; for a leak, the train lines or the validation
lines. A *false alarm* is a line that a finding of that name has and that has no planted defect of any name; lines
of borderline pairs count neither way for near duplicates and near leaks, and so do all lines of a file without a list
of such pairs. Notes count like warnings, except on
clean files and for what must not be reported. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from heldout.pipeline.findings import Report, place
from heldout.processes.checking import check

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
MODEL = "smollm2-135m-instruct"

#: Names of the data that the product calls otherwise: OpenAI's code for too few examples is what scripts look for.
ALIASES = {
    "too_few_examples": {"invalid_n_examples"},
    "answer_value_case": {"unknown_label"},  # the data's own note: right too
}
#: Equal after normalising is exact to the product.
EXACT_OF = {"near_duplicate": "exact_duplicate", "leak_near": "leak_exact"}
NEAR = {"near_duplicate", "leak_near", "near_conflict"}
LEAKS = {"leak_exact", "leak_near"}

STRUCTURE = (
    "blank_line content_not_text duplicate_json_key empty_assistant empty_user invalid_json invalid_utf8 "
    "last_not_assistant missing_field missing_messages not_an_object role_order several_objects_on_line "
    "truncated_json unknown_role html_entities html_markup invisible_character mojibake nul_character "
    "replacement_character"
).split()
FORMAT = (
    "answer_code_fence answer_extra_key answer_extra_text answer_invalid_json answer_key_name answer_prose "
    "answer_spacing answer_type answer_value_case answer_whitespace system_prompt_differs"
).split()


class Bar(NamedTuple):
    """What issue 4 asks for: recall and precision of these kinds together, on all files or on one."""

    name: str
    kinds: Sequence[str]
    recall: float
    precision: float
    file: str | None = None


BARS = (
    Bar("structure", STRUCTURE, 1.0, 1.0),
    Bar("exact duplicates", ["exact_duplicate"], 1.0, 1.0),
    Bar("exact leaks", ["leak_exact"], 1.0, 1.0),
    Bar("contradictions", ["conflicting_answers"], 1.0, 1.0),
    Bar("near duplicates", ["near_duplicate"], 0.95, 0.95),
    Bar("near leaks", ["leak_near"], 0.95, 0.95),
    Bar("answer format", FORMAT, 0.95, 0.95),
    Bar("wrong labels at 30 %", ["wrong_label"], 0.65, 0.55, file="label_noise30.jsonl"),
    Bar("one-off facts", ["one_off_fact"], 0.90, 0.90),
    Bar("personal data", ["personal_data"], 0.95, 0.95),
)
WARNINGS_ON_CLEAN = 1


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A defect of the answer key."""

    kind: str
    lines: frozenset[int]
    validation_lines: frozenset[int]
    names: frozenset[str]  # codes that are right


@dataclass(frozen=True, kw_only=True)
class Case:
    """A dirty file with its answer key."""

    path: Path
    validation: Path | None
    planted: tuple[Planted, ...]
    file_level: tuple[str, ...]
    harmless: frozenset[int]  # must not be reported
    borderline: frozenset[int] | None  # lines that nature made alike; None where nobody looked for them

    def with_defect(self, part: str) -> frozenset[int]:
        """Lines of a part where something is planted."""
        return frozenset().union(*(one.lines if part == "train" else one.validation_lines for one in self.planted))


@dataclass
class Tally:
    """One kind in one file. A false alarm is (part, line, severity)."""

    planted: int = 0
    found: int = 0
    on_line: int = 0  # the line is reported, under whatever name
    reported: int = 0
    false: list[tuple[str, int, str]] = field(default_factory=list)
    missed: list[tuple[int, ...]] = field(default_factory=list)


def read_case(answers: Path) -> Case:
    """The answer key beside a dirty file."""
    key = json.loads(answers.read_text())
    validation = key.get("validation_file")
    return Case(
        path=answers.parent / key["file"],
        validation=answers.parent / validation if validation else None,
        planted=tuple(_planted(one) for one in key["defects"]),
        file_level=tuple(one["kind"] for one in key["file_level"]),
        harmless=frozenset(line for one in key.get("not_defects", []) for line in one["lines"]),
        borderline=frozenset(int(line) for pair in key["borderline_pairs"] for line in pair[:2])
        if "borderline_pairs" in key
        else None,
    )


def _planted(one: dict[str, Any]) -> Planted:
    kind = one["kind"]
    names = {kind, *one.get("also", ()), *ALIASES.get(kind, ())}
    if one.get("equal_after_normalising") and kind in EXACT_OF:
        names.add(EXACT_OF[kind])
    return Planted(
        kind=kind,
        lines=frozenset(one["lines"]),
        validation_lines=frozenset(one.get("validation_lines", ())),
        names=frozenset(names),
    )


def tally(case: Case, report: Report, kinds: frozenset[str]) -> dict[str, Tally]:
    """What was found and what was made up, by kind. `kinds` are the names that are scored at all."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    parts = {file.name: file.part for file in report.files}
    named = [(parts[one.file], one, frozenset(one.lines)) for one in report.findings if one.lines]
    anywhere = {
        part: frozenset().union(*(lines for where, _, lines in named if where == part)) for part in parts.values()
    }
    for planted in case.planted:
        mine = tallies[planted.kind]
        mine.planted += 1
        mine.on_line += planted.lines <= anywhere["train"] or bool(
            planted.validation_lines and planted.validation_lines <= anywhere.get("valid", frozenset())
        )
        if any(_has(planted, part, one.code, lines) for part, one, lines in named):
            mine.found += 1
        else:
            mine.missed.append(tuple(sorted(planted.lines)))
    for part, finding, lines in named:
        if finding.code not in kinds:
            continue
        mine = tallies[finding.code]
        planted_here = case.with_defect(part)
        counted = lines
        if finding.code in NEAR:
            counted = lines & planted_here if case.borderline is None else lines - (case.borderline - planted_here)
        mine.reported += len(counted)
        mine.false += [(part, line, finding.severity) for line in sorted(counted - planted_here)]
    return tallies


def _has(planted: Planted, part: str, code: str, lines: frozenset[int]) -> bool:
    if code not in planted.names:
        return False
    if part == "valid":
        return bool(planted.validation_lines) and planted.validation_lines <= lines
    return part == "train" and planted.lines <= lines


def missing_file_level(case: Case, report: Report) -> list[str]:
    """Kinds about the file as a whole that no finding names."""
    codes = {finding.code for finding in report.findings}
    return [kind for kind in case.file_level if not codes & {kind, *ALIASES.get(kind, ())}]


def accuracy(model: str | None, only: Sequence[str], *, listed: bool) -> bool:
    """Print the tables; True when every bar is met."""
    answers = sorted((SHARED / "dirty").glob("*.expected.json"))
    if not answers:
        sys.exit(f"{SHARED / 'dirty'} is not there: the planted files are not part of the repository")
    cases = [case for case in map(read_case, answers) if not only or case.path.stem in only]
    kinds = frozenset(one.kind for case in map(read_case, answers) for one in case.planted)
    found: dict[tuple[str, str], Tally] = {}
    unseen: list[str] = []
    harmless: list[str] = []
    began = time.monotonic()
    for case in cases:
        report = check(case.path, case.validation, model=model)
        found |= {(kind, case.path.name): one for kind, one in tally(case, report, kinds).items()}
        unseen += [f"{case.path.name}: {kind}" for kind in missing_file_level(case, report)]
        harmless += list(_harmless(case, report, kinds))
        print(f"{case.path.name}: {report.seconds:.1f} s", file=sys.stderr)
    print_kinds(found, listed=listed)
    wanted = sum(len(case.file_level) for case in cases)
    print(f"\nFile level: {wanted - len(unseen)} of {wanted} found, missed: {', '.join(unseen) or 'none'}")
    print(f"Harmless lines that were reported as a warning or an error: {'; '.join(harmless) or 'none'}")
    loud = print_clean(model) if not only else []
    print(f"\nAll of this took {time.monotonic() - began:.0f} s{' with a model and the encoder' if model else ''}.\n")
    return print_bars(found, unseen, harmless, loud)


def _harmless(case: Case, report: Report, kinds: frozenset[str]) -> Iterator[str]:
    for finding in report.findings:
        lines = sorted(case.harmless & set(finding.lines) - case.with_defect("train"))
        if finding.severity != "note" and finding.code in kinds and finding.file == str(case.path) and lines:
            yield f"{case.path.name} {finding.code} {place(lines)}"


def print_kinds(found: dict[tuple[str, str], Tally], *, listed: bool) -> None:
    """A row for each kind, all files together, and what was missed or made up."""
    print(
        "| kind | planted | reported under any name | found | recall | lines with the name | false alarms | precision |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    details = []
    for kind in sorted({kind for kind, _ in found}):
        mine = {file: one for (name, file), one in found.items() if name == kind}
        whole = _sum(mine.values())
        print(
            f"| {kind} | {whole.planted} | {whole.on_line} | {whole.found} | {_share(whole.found, whole.planted)} | "
            f"{whole.reported} | {len(whole.false)} | {_share(whole.reported - len(whole.false), whole.reported)} |"
        )
        for file, one in mine.items():
            if one.missed:
                shown = one.missed if listed else one.missed[:12]
                more = "" if len(shown) == len(one.missed) else f" and {len(one.missed) - len(shown)} more"
                details.append(f"- {kind}, {file}, missed: {'; '.join(place(lines) for lines in shown)}{more}")
            for part in ("train", "valid"):
                for severity in ("error", "warning", "note"):
                    lines = [line for where, line, how in one.false if where == part and how == severity]
                    if lines:
                        where = "" if part == "train" else " of the validation file"
                        at_most = None if listed else 15
                        details.append(f"- {kind}, {file}, false ({severity}): {place(lines, at_most=at_most)}{where}")
    print("\n" + "\n".join(details or ["Nothing missed, no false alarms."]))


def print_clean(model: str | None) -> list[str]:
    """A row for each clean file; those with too many warnings."""
    print("\n| clean file | errors | warnings | notes | codes |")
    print("|---|--:|--:|--:|---|")
    loud = []
    for train, valid in clean_files():
        report = check(train, valid, model=model)
        counts = {severity: report.count(severity) for severity in ("error", "warning", "note")}  # type: ignore[arg-type]
        codes = ", ".join(f"{one.code} ({one.severity})" for one in report.findings)
        name = f"{train.parent.name}/{train.name}{' + validation' if valid else ''}"
        print(f"| {name} | {counts['error']} | {counts['warning']} | {counts['note']} | {codes} |")
        if counts["error"] or counts["warning"] > WARNINGS_ON_CLEAN:
            loud.append(name)
    return loud


def clean_files() -> Iterator[tuple[Path, Path | None]]:
    """Files with nothing wrong, alone and with their validation file."""
    for name in ("control_clean", "control_unusual"):
        validation = SHARED / "dirty" / f"{name}.validation.jsonl"
        yield SHARED / "dirty" / f"{name}.jsonl", validation if validation.exists() else None
    for folder in sorted((SHARED / "tasks").iterdir()):
        if folder.is_dir():
            yield folder / "train.jsonl", None
            yield folder / "train.jsonl", folder / "validation.jsonl"
    yield ROOT / "examples" / "tickets.train.jsonl", ROOT / "examples" / "tickets.validation.jsonl"


def print_bars(
    found: dict[tuple[str, str], Tally], unseen: Sequence[str], harmless: Sequence[str], loud: Sequence[str]
) -> bool:
    """A row for each bar of issue 4, item 3."""
    print("| bar | recall | precision | wanted | |")
    print("|---|--:|--:|--:|---|")
    met = []
    for bar in BARS:
        whole = _sum(one for (kind, file), one in found.items() if kind in bar.kinds and bar.file in (None, file))
        recall, precision = (
            _ratio(whole.found, whole.planted),
            _ratio(whole.reported - len(whole.false), whole.reported),
        )
        met.append(recall >= bar.recall and precision >= bar.precision)
        print(
            f"| {bar.name} | {recall:.1%} | {precision:.1%} | {bar.recall:.0%} / {bar.precision:.0%} | "
            f"{'PASS' if met[-1] else 'FAIL'} |"
        )
    for name, bad in (
        ("every kind about a whole file", unseen),
        ("no harmless line reported", harmless),
        ("at most one warning on clean files", loud),
    ):
        met.append(not bad)
        print(f"| {name} | | | | {'PASS' if not bad else f'FAIL ({len(bad)})'} |")
    return all(met)


def _sum(tallies: Iterable[Tally]) -> Tally:
    whole = Tally()
    for one in tallies:
        whole.planted += one.planted
        whole.found += one.found
        whole.on_line += one.on_line
        whole.reported += one.reported
        whole.false += one.false
        whole.missed += one.missed
    return whole


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


# Speed


class Measured(NamedTuple):
    """How a command ended."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    out: str
    err: str


def measure(*arguments: str | Path, limit: float = 3600) -> Measured:
    """Run `heldout …` in a child process; its wall time and its peak resident memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        child = Popen(
            [sys.executable, "-m", "heldout", *map(str, arguments)],
            stdin=DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
        )
        pid = 0
        while not pid and time.monotonic() - began < limit:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            time.sleep(0.02)
        if not pid:
            child.kill()
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, errors = out.read(200_000).decode(errors="replace"), err.read(20_000).decode(errors="replace")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(child.returncode, seconds, cpu, usage.ru_maxrss * 1024, text, errors)


_SYLLABLES = "ka re mi so tu la ven dor pel nas ti or um el ba ri go fen sal que mo zu hi chi der an".split()
_SUBJECTS = ("order", "invoice", "parcel", "account", "card", "booking", "delivery", "refund", "password", "contract")
_LABELS = tuple(
    f"{kind}_{what}" for kind in ("billing", "delivery", "access", "quality") for what in ("open", "late", "wrong")
)
_LABEL_SYSTEM = f'Sort the message. Answer with JSON only: {{"queue": LABEL}}. LABEL is one of: {", ".join(_LABELS)}.'
_RECORD_SYSTEM = "Extract the order from the message as JSON with the keys item, count and city."
_TEXT_SYSTEM = "Rewrite the message politely, in one or two sentences."


def rows(n: int, seed: int = 0) -> Iterator[str]:
    """Lines of a training file of our own making: labels, records and free text in turn, one row in a hundred
    with something wrong."""
    dice = random.Random(seed)
    words = ["".join(dice.choices(_SYLLABLES, k=dice.randint(1, 4))) for _ in range(8_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    pool = dice.choices(words, weights, k=200_000)
    previous = ""
    for number in range(n):
        start = dice.randrange(len(pool) - 80)
        text = " ".join(pool[start : start + dice.randint(6, 60)])
        subject = dice.choice(_SUBJECTS)
        form = number % 3
        if form == 0:
            label = _LABELS[hash_of(subject, pool[start]) % len(_LABELS)]
            row = (_LABEL_SYSTEM, f"My {subject}: {text} {label.split('_')[1]}?", json.dumps({"queue": label}))
        elif form == 1:
            count, city = dice.randint(1, 99), pool[start].title()
            answer = {"item": pool[start + 1], "count": count, "city": city}
            row = (_RECORD_SYSTEM, f"Please send {count} {answer['item']} to {city}. {text}", json.dumps(answer))
        else:
            row = (_TEXT_SYSTEM, f"{text}!!", f"Could you please look into my {subject}? {text.capitalize()}.")
        line = json.dumps(
            {
                "messages": [
                    {"role": role, "content": one}
                    for role, one in zip(("system", "user", "assistant"), row, strict=True)
                ]
            }
        )
        if number and dice.random() < 0.01:
            line = dice.choice(
                (
                    previous,
                    "",
                    line[:-9],
                    line.replace('"assistant"', '"bot"'),
                    line.replace(row[2][-3:], row[2][-3:] + " "),
                )
            )
        yield line
        previous = line


def hash_of(*parts: str) -> int:
    """A number that is the same in every process."""
    return sum(ord(letter) * 31**position for position, letter in enumerate("".join(parts))) % 1_000_003


def write_rows(path: Path, n: int) -> None:
    """A file of so many rows."""
    with path.open("w") as out:
        out.writelines(f"{line}\n" for line in rows(n))


def _long_line(out: Path) -> None:
    example = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    with out.open("w") as file:
        file.write(f"{example}\n" * 20)
        file.write('{"messages": [{"role": "user", "content": "')
        for _ in range(100):
            file.write("word " * 200_000)
        file.write('"}, {"role": "assistant", "content": "y"}]}\n')


def _bomb(out: Path) -> None:
    out.write_text('{"messages": ' + "[" * 4_000_000 + "]" * 4_000_000 + "}\n")


def _wide_bomb(out: Path) -> None:
    out.write_text('{"messages": [' + "[],".join([""] * 3_000_000) + "{}]}\n")


def _gzip(out: Path) -> None:
    with gzip.open(out, "wt") as file:
        file.writelines(f"{line}\n" for line in rows(1_000))


#: name -> how to write it. Each is to end with a clear finding, in a minute at most.
HOSTILE: dict[str, Callable[[Path], object]] = {
    "a line of 100 MB": _long_line,
    "100 MB without an end of line": lambda out: out.write_bytes(b"a" * 100_000_000),
    "10 million blank lines": lambda out: out.write_bytes(b"\n" * 10_000_000),
    "4 million nested arrays": _bomb,
    "3 million empty arrays": _wide_bomb,
    "a million empty objects": lambda out: out.write_bytes(b"{}\n" * 1_000_000),
    "gzip": _gzip,
    "PDF": lambda out: out.write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + random.Random(1).randbytes(100_000)),
    "UTF-16": lambda out: out.write_text("\n".join(rows(100)), encoding="utf-16"),
    "random bytes": lambda out: out.write_bytes(random.Random(2).randbytes(5_000_000)),
    "zero bytes": lambda out: out.write_bytes(bytes(5_000_000)),
    "nothing": lambda out: out.write_bytes(b""),
}
HOSTILE_SECONDS = 60.0
MAX_PEAK = 1_500_000_000
#: rows -> seconds, at most (issue 4, item 4).
SECONDS = {10_000: 20.0, 100_000: 240.0}


def speed(sizes: Sequence[int], *, huge: bool) -> bool:
    """Print time and memory; True when every bar is met."""
    met = []
    with tempfile.TemporaryDirectory(dir=_roomy()) as folder:
        path = Path(folder) / "rows.jsonl"
        print("| file | MB | seconds | CPU seconds | peak MB | exit code | findings | |")
        print("|---|--:|--:|--:|--:|--:|---|---|")
        for n in (*sizes, *([4_400_000] if huge else [])):
            write_rows(path, n)
            done = measure("check", path, "--json")
            fast = done.seconds <= SECONDS.get(n, float("inf"))
            met.append(_print_measured(f"{n:,} rows", path, done, ok=fast and done.code in (0, 2)))
        for name, write in HOSTILE.items():
            write(path)
            done = measure("check", path, "--json", limit=600)
            met.append(_print_measured(name, path, done, ok=done.code == 2 and done.seconds <= HOSTILE_SECONDS))
    return all(met)


def _print_measured(name: str, path: Path, done: Measured, *, ok: bool) -> bool:
    ok = ok and done.peak_bytes <= MAX_PEAK and "Traceback" not in done.err
    codes = Counter(line.split('"')[3] for line in done.out.splitlines() if line.strip().startswith('"code": '))
    cells = (
        name,
        f"{path.stat().st_size / 1e6:,.1f}",
        f"{done.seconds:.1f}",
        f"{done.cpu_seconds:.1f}",
        f"{done.peak_bytes / 1e6:,.0f}",
        str(done.code),
        ", ".join(codes) or done.err.strip()[-200:],
        "PASS" if ok else "FAIL",
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    return ok


def _roomy() -> str | None:
    # /tmp is memory on many machines.
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="store_true", help="count the bundled model's tokens, use the encoder")
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="dirty files, without .jsonl")
    parser.add_argument("--list", action="store_true", help="every miss and false alarm")
    parser.add_argument("--speed", action="store_true", help="time and memory instead of accuracy")
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000], help="sizes for --speed")
    parser.add_argument("--huge", action="store_true", help="a file of 2 GB as well")
    asked = parser.parse_args()
    if asked.speed:
        met = speed(asked.rows, huge=asked.huge)
    else:
        met = accuracy(MODEL if asked.encoder else None, asked.only, listed=asked.list)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
