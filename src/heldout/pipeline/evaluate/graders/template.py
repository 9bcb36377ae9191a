"""`{{ sample.output_text }}` and `{{ item.target }}`: what a grader's texts may refer to. Names alone, no code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.metrics.exact import json_value
from heldout.pipeline.types import Example

_PLACE = re.compile(r"\{\{(.*?)\}\}", re.S)
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]")

#: What there is to refer to; below the JSON ones and `messages` a path may go on.
SAMPLE = ("output_text", "output_json")
ITEM = ("messages", "input", "target", "target_json", "line")
_DEEP = ("output_json", "messages", "target_json")


class NotInAnswer(Exception):
    """The model's answer has no such part: it is no JSON, or has no such key."""


@dataclass(frozen=True, kw_only=True)
class Graded:
    """An example and the answer that a model gave to it."""

    example: Example
    answer: str

    def look_up(self, path: Sequence[str | int]) -> Any:
        """What a path stands for. Raises NotInAnswer, or InvalidValue when it is the row that lacks it."""
        root, name, *rest = path
        value = self._sample(str(name)) if root == "sample" else self._item(str(name))
        try:
            for step in rest:
                value = value[step]
        except (KeyError, IndexError, TypeError) as missing:
            if root == "sample":
                raise NotInAnswer from missing
            raise InvalidValue(
                f"line {self.example.line}: the row has no {_written(path)}", param="grader"
            ) from missing
        return value

    def _sample(self, name: str) -> Any:
        if name == "output_text":
            return self.answer
        value = json_value(self.answer)
        if value is None:
            raise NotInAnswer
        return value

    def _item(self, name: str) -> Any:
        example = self.example
        if name == "messages":
            return list(example.prompt)
        if name == "input":
            return next((str(one["content"]) for one in reversed(example.prompt) if one["role"] == "user"), "")
        if name == "line":
            return example.line
        value = example.target if name == "target" else json_value(example.target)
        if value is None:
            raise InvalidValue(
                f"line {example.line}: the answer is no JSON, so there is no item.{name}", param="grader"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class Template:
    """A text with places to fill in: texts and the paths between them take turns."""

    texts: tuple[str, ...]
    paths: tuple[tuple[str | int, ...], ...]

    def fill(self, graded: Graded) -> str:
        """The text for one answer. Raises as `Graded.look_up`."""
        filled = self.texts[0]
        for path, text in zip(self.paths, self.texts[1:], strict=True):
            value = graded.look_up(path)
            filled += (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) + text
        return filled


def read_template(text: Any, where: str) -> Template:
    """Raises InvalidValue for what is no text, or refers to what there is not."""
    if not isinstance(text, str):
        raise InvalidValue(f"{where}: expected a text, perhaps with {{{{ sample.output_text }}}} in it", param="grader")
    pieces = _PLACE.split(text)
    return Template(texts=tuple(pieces[::2]), paths=tuple(_path(inner.strip(), where) for inner in pieces[1::2]))


def _path(written: str, where: str) -> tuple[str | int, ...]:
    root = re.match(r"sample|item", written)
    steps: list[str | int] = []
    at = root.end() if root else 0
    while root and at < len(written):
        step = _STEP.match(written, at)
        if not step:
            break
        name, place, quoted, double_quoted = step.groups()
        steps.append(int(place) if place is not None else next(one for one in (name, quoted, double_quoted) if one))
        at = step.end()
    known = SAMPLE if root and root[0] == "sample" else ITEM
    if root is None or at < len(written) or not steps or steps[0] not in known or (steps[1:] and steps[0] not in _DEEP):
        raise InvalidValue(
            f"{where}: there is no {{{{ {written} }}}}. There are {', '.join(f'sample.{one}' for one in SAMPLE)} and "
            f"{', '.join(f'item.{one}' for one in ITEM)}; behind {', '.join(_DEEP)} a path may go on (.key, [0]).",
            param="grader",
        )
    return (root[0], *steps)


def _written(path: Sequence[str | int]) -> str:
    return str(path[0]) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path[1:])
