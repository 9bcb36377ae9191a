"""Which rows of a training file stay together: the smallest pieces that may be held out.

A piece (a unit) is a set of prompts. Rows with one prompt, near duplicates, rows about one long passage, rows of
a group the user declared, and rows of which one answers the other's prompt in an earlier turn are in one unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from heldout.pipeline.checks.groups import all_shown_prompts, prompt_fingerprint
from heldout.pipeline.checks.near import Near
from heldout.pipeline.checks.parts import name_lines
from heldout.pipeline.checks.rows import hash64, plain
from heldout.pipeline.types import Dataset, Example, Finding

#: A passage of so many plain characters is a document: two questions about it are not independent.
PASSAGE = 200
#: What more prompts than this share is an instruction, not a document; at least MOST_FEW prompts may share one.
MOST_SHARING, MOST_FEW = 0.10, 5
#: A group of lookalikes above this share would take what is to be learned with it when it is held out.
MOST_ALIKE = 0.20

Unit = tuple[str, ...]  # prompts that are held out together
_Ties = Mapping[Hashable, Sequence[str]]  # what ties prompts together -> the prompts


@dataclass(frozen=True, kw_only=True)
class Units:
    """The prompts of a file (with their rows, in the file's order), and the units that can be held out."""

    prompts: Mapping[str, list[Example]]
    units: tuple[Unit, ...]
    findings: tuple[Finding, ...]


def find_units(train: Dataset, near: Near, *, most: float) -> Units:
    """The units of the training file, each of at most `most` prompts. `near` is about files of which this is
    the first. What cannot be held out is in no unit, and the findings say so."""
    asked = [prompt_fingerprint(row.prompt) for row in train.examples]
    prompts: dict[str, list[Example]] = {}
    for prompt, row in zip(asked, train.examples, strict=True):
        prompts.setdefault(prompt, []).append(row)
    declared = _ties((prompt, row.group) for prompt, row in zip(asked, train.examples, strict=True) if row.group)
    alike = {**_ties(zip(asked, near.joined[: len(asked)].tolist(), strict=True)), **_passages(prompts)}

    blocks = _blocks(prompts, [*declared.values(), *alike.values()])
    loose = {prompt for block in blocks if len(block) > max(MOST_FEW, MOST_ALIKE * len(prompts)) for prompt in block}
    findings = []
    if loose and any(prompt in loose for tied in alike.values() for prompt in tied):
        kept = [[prompt for prompt in tied if prompt not in loose] for tied in alike.values()]
        blocks = _blocks(prompts, [*declared.values(), *kept])
        findings.append(_too_alike(train, [row for prompt in loose for row in prompts[prompt]]))
    units = _inseparable(prompts, blocks, most=max(1, math.ceil(most)))
    held = {prompt for unit in units for prompt in unit}
    big = [block for block in blocks if len(block) > most and block[0] not in held]
    if big:
        findings.append(_too_big(train, [row for block in big for prompt in block for row in prompts[prompt]]))
    return Units(prompts=prompts, units=tuple(units), findings=tuple(findings))


def _ties(pairs: Iterable[tuple[str, Hashable]]) -> dict[Hashable, list[str]]:
    """What ties two prompts or more."""
    found: dict[Hashable, dict[str, None]] = {}
    for prompt, tie in pairs:
        found.setdefault(tie, {})[prompt] = None
    return {tie: list(tied) for tie, tied in found.items() if len(tied) > 1}


def _passages(prompts: Mapping[str, Sequence[Example]]) -> dict[Hashable, list[str]]:
    """Long passages that a few prompts share."""
    found = _ties(
        (prompt, ("passage", passage)) for prompt, rows in prompts.items() for passage in set(passages(rows[0]))
    )
    most = max(MOST_FEW, MOST_SHARING * len(prompts))
    return {passage: tied for passage, tied in found.items() if len(tied) <= most}


def passages(row: Example) -> Iterator[int]:
    """Hashes of the long passages in what the user wrote: paragraphs, and the beginning and the end of a turn."""
    for message in row.prompt:
        if message["role"] == "user" and len(message["content"]) >= PASSAGE:
            text = plain(message["content"])
            if len(text) > PASSAGE:
                yield hash64(text[:PASSAGE])
                yield hash64(text[-PASSAGE:])
            for paragraph in map(plain, message["content"].split("\n")):
                if len(paragraph) >= PASSAGE:
                    yield hash64(paragraph)


def _blocks(prompts: Iterable[str], ties: Iterable[Sequence[str]]) -> list[Unit]:
    """The prompts in sets that no tie joins to another set, all in the file's order."""
    edges: dict[str, list[str]] = {}
    for tied in ties:
        for prompt in tied[1:]:
            edges.setdefault(tied[0], []).append(prompt)
    return _connected(prompts, edges)


def _connected(nodes: Iterable[str], edges: Mapping[str, Iterable[str]]) -> list[Unit]:
    """The nodes in sets that no edge joins to another set, all in the nodes' order."""
    unit_of = {node: [node] for node in nodes}
    place = {node: i for i, node in enumerate(unit_of)}
    for node in place:
        for other in edges.get(node, ()):
            if other not in unit_of:
                continue
            small, large = sorted((unit_of[node], unit_of[other]), key=len)
            if small is not large:
                large += small
                unit_of.update(dict.fromkeys(small, large))
    units = {id(unit): tuple(sorted(unit, key=place.__getitem__)) for unit in unit_of.values()}
    return sorted(units.values(), key=lambda unit: place[unit[0]])


def _inseparable(prompts: Mapping[str, Sequence[Example]], blocks: Sequence[Unit], *, most: int) -> list[Unit]:
    """The blocks in units that can be held out: no row outside a unit answers a prompt of it.

    A unit that grew above `most` prompts loses the block that most other prompts answer (an opening that all
    conversations share, say): that one is in no unit, and so are those that its own rows answer.
    """
    block_of = {prompt: block for block in blocks for prompt in block}
    shown = {prompt: set(all_shown_prompts(rows)) & prompts.keys() for prompt, rows in prompts.items()}
    answered_by = Counter(one for ones in shown.values() for one in ones)
    # A block is named by its first prompt.
    answers = {
        block[0]: list(dict.fromkeys(block_of[one][0] for prompt in block for one in sorted(shown[prompt])))
        for block in blocks
    }
    place = {block[0]: i for i, block in enumerate(blocks)}
    units: list[Unit] = []
    waiting = _connected(place, answers)
    while waiting:
        names = waiting.pop()
        unit = [prompt for name in names for prompt in block_of[name]]
        if len(unit) <= most:
            units.append(tuple(unit))
            continue
        free = dict.fromkeys(names)
        leaving = [max(names, key=lambda name: max(answered_by[prompt] for prompt in block_of[name]))]
        if len(block_of[biggest := max(names, key=lambda name: len(block_of[name]))]) > most:
            leaving = [biggest]
        while leaving:
            name = leaving.pop()
            del free[name]
            leaving += [one for one in answers[name] if one in free and one not in leaving]
        waiting += _connected(free, answers)
    order = {prompt: i for i, prompt in enumerate(prompts)}
    return sorted((tuple(sorted(unit, key=order.__getitem__)) for unit in units), key=lambda unit: order[unit[0]])


def _too_alike(train: Dataset, rows: Sequence[Example]) -> Finding:
    lines = tuple(sorted(row.line for row in rows))
    return Finding(
        code="group_split",
        severity="warning",
        message=(
            f"{len(lines)} of {len(train)} rows of {train.name} are so much alike (near duplicates, or rows about one "
            f"passage) that they form groups of more than {MOST_ALIKE:.0%} of the file ({name_lines(lines)}). Held "
            "out together they would leave too little to learn from, so these groups are divided by prompt: the "
            "score on them shows close variants of what was trained on, not new inputs. Add rows of other kinds, or "
            "a holdout file."
        ),
        file=train.name,
        lines=lines,
    )


def _too_big(train: Dataset, rows: Sequence[Example]) -> Finding:
    lines = tuple(sorted(row.line for row in rows))
    return Finding(
        code="group_not_held_out",
        severity="note",
        message=(
            f"{len(lines)} of {len(train)} rows of {train.name} are in groups (near duplicates, one passage, or your "
            f"metadata.group) too large to be held out ({name_lines(lines)}): they are trained on and not scored."
        ),
        file=train.name,
        lines=lines,
    )
