"""One grader of each kind, from JSON to a function that scores answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from heldout.engine.base import Message, Reply, Sampling
from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.graders.formula import read_formula
from heldout.pipeline.evaluate.graders.template import Graded, NotInAnswer, Template, read_template
from heldout.pipeline.evaluate.metrics.exact import json_value, number_in
from heldout.pipeline.evaluate.metrics.overlap import bleu, fuzzy_match, gleu, rouge_l, rouge_n
from heldout.pipeline.types import Example

#: Asks a model by name: one reply for each conversation.
Ask = Callable[[str, Sequence[Sequence[Message]], Sampling], list[Reply]]
#: Told what a reader of the scores must know.
Tell = Callable[[str], None]
Grade = Callable[[Sequence[Graded]], list[float]]

OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda given, reference: given == reference,
    "ne": lambda given, reference: given != reference,
    "like": lambda given, reference: reference in given,
    "ilike": lambda given, reference: reference.casefold() in given.casefold(),
}
SIMILARITIES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{n}": partial(rouge_n, n=n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}
_NOT_HERE = {
    "cosine": "it is the similarity by text-embedding-3-large, and another encoder would give other numbers under the "
    "same name",
    "meteor": "it needs WordNet's synonyms, which are not installed",
}
_NO_GRADER = {
    "python": "it is code, and code that comes with a grader is not run; write the comparison as a multi grader",
    "label_model": "only score_model asks a model; let it give a number for each label",
}

#: Tokens that a judge may write before its number is looked for.
JUDGE_TOKENS = 512


class Grader(NamedTuple):
    """How answers are scored, whether only 0 and 1 come out, and the models that are asked for it."""

    name: str
    binary: bool
    grade: Grade
    judges: tuple[str, ...] = ()


def grader_metric(grader: Grader, usual: Metric) -> Metric:
    """A grader as a metric. Where two answers are compared with each other, and not with a row, `usual` does it."""

    def grade(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        pairs = zip(examples, answers, strict=True)
        return grader.grade([Graded(example=example, answer=answer) for example, answer in pairs])

    return replace(usual, name=grader.name, binary=grader.binary, grade=grade)


def checked_grader(raw: dict[str, Any] | None, *, metric: str | None) -> dict[str, Any] | None:
    """A job's grader as it was given, known to be sound before anything is loaded. Raises InvalidValue, also when a
    metric was asked for beside it."""
    if raw is None:
        return None
    if metric is not None:
        raise InvalidValue("A metric and a grader were both given; give one of them.", param="grader")
    read_grader(raw)
    return raw


def read_grader(raw: Any, ask: Ask | None = None, tell: Tell = lambda text: None) -> Grader:
    """A grader of OpenAI's API. Raises InvalidValue with what is wrong, or cannot be had here.

    Args:
        ask: who answers for `score_model`; None: that kind is refused.
        tell: hears of judges whose replies held no score.
    """
    if not isinstance(raw, dict):
        raise InvalidValue('A grader is a JSON object with a "type".', param="grader")
    kind = raw.get("type")
    name = raw.get("name", kind if isinstance(kind, str) else "without a type")
    if not isinstance(name, str) or not name:
        raise InvalidValue("A grader's name is a text.", param="grader")
    where = f"grader {name!r}"
    if kind == "string_check":
        return _string_check(raw, name, where)
    if kind == "text_similarity":
        return _text_similarity(raw, name, where)
    if kind == "score_model":
        return _score_model(raw, name, where, ask, tell)
    if kind == "multi":
        return _multi(raw, name, where, ask, tell)
    if isinstance(kind, str) and kind in _NO_GRADER:
        raise InvalidValue(
            f"{where}: graders of the type {kind} are not supported: {_NO_GRADER[kind]}.", param="grader"
        )
    kinds = "string_check, text_similarity, score_model or multi"
    raise InvalidValue(f"{where}: unknown type {kind!r}. Expected {kinds}.", param="grader")


def _string_check(raw: dict[str, Any], name: str, where: str) -> Grader:
    _only(raw, ("input", "reference", "operation"), where)
    operation = _one_of(OPERATIONS, raw.get("operation"), f"{where}: operation")
    return Grader(name, True, _compared(raw, where, lambda given, reference: float(operation(given, reference))))


def _text_similarity(raw: dict[str, Any], name: str, where: str) -> Grader:
    _only(raw, ("input", "reference", "evaluation_metric", "pass_threshold"), where)
    asked = raw.get("evaluation_metric")
    if isinstance(asked, str) and asked in _NOT_HERE:
        others = ", ".join(SIMILARITIES)
        raise InvalidValue(
            f"{where}: {asked} cannot be computed here: {_NOT_HERE[asked]}. There are {others}.", param="grader"
        )
    similarity = _one_of(SIMILARITIES, asked, f"{where}: evaluation_metric")
    return _passing(raw, Grader(name, False, _compared(raw, where, similarity)), where, 0.0, 1.0)


def _compared(raw: dict[str, Any], where: str, score: Callable[[str, str], float]) -> Grade:
    given, reference = (read_template(raw.get(part), f"{where}: {part}") for part in ("input", "reference"))

    def one(graded: Graded) -> float:
        try:
            return score(given.fill(graded), reference.fill(graded))
        except NotInAnswer:
            return 0.0

    return lambda rows: [one(graded) for graded in rows]


def _score_model(raw: dict[str, Any], name: str, where: str, ask: Ask | None, tell: Tell) -> Grader:
    _only(raw, ("model", "input", "range", "sampling_params", "pass_threshold"), where)
    if ask is None:
        raise InvalidValue(f"{where}: score_model is for heldout evaluate; a job asks no judge.", param="grader")
    model, low, high = raw.get("model"), *_range(raw.get("range"), where)
    if not isinstance(model, str) or not model:
        raise InvalidValue(f"{where}: model names the model that judges.", param="grader")
    sampling = _sampling(raw.get("sampling_params"), where)
    turns = _turns(raw.get("input"), where)

    def grade(rows: Sequence[Graded]) -> list[float]:
        scores = [0.0] * len(rows)
        asked: dict[int, list[Message]] = {}
        for position, graded in enumerate(rows):
            try:
                asked[position] = [{"role": role, "content": text.fill(graded)} for role, text in turns]
            except NotInAnswer:
                continue
        replies = ask(model, list(asked.values()), sampling)
        unclear = []
        for position, reply in zip(asked, replies, strict=True):
            given = _judged(reply.text)
            if given is None or not low <= given <= high:
                unclear.append(rows[position].example.line)
            else:
                scores[position] = (given - low) / (high - low)
        if unclear:
            lines = ", ".join(map(str, unclear[:10])) + (" …" if len(unclear) > 10 else "")
            tell(
                f"{model} gave no score from {low:g} to {high:g} for {len(unclear)} of {len(rows)} answers (lines "
                f"{lines}); they count as 0"
            )
        return scores

    return _passing(raw, Grader(name, False, grade, (model,)), where, low, high)


def _multi(raw: dict[str, Any], name: str, where: str, ask: Ask | None, tell: Tell) -> Grader:
    _only(raw, ("graders", "calculate_output"), where)
    given = raw.get("graders")
    if isinstance(given, dict) and isinstance(given.get("type"), str):  # one grader, as the client's types have it
        given = {str(given.get("name", given["type"])): given}
    if not isinstance(given, dict) or not given:
        raise InvalidValue(f"{where}: graders is an object of graders by name.", param="grader")
    parts: dict[str, Grader] = {}
    for key, one in given.items():
        if isinstance(one, dict) and one.get("type") == "multi":
            raise InvalidValue(f"{where}: {key!r} is a multi grader too; they cannot be nested.", param="grader")
        parts[key] = read_grader({"name": key, **one} if isinstance(one, dict) else one, ask, tell)
    formula = read_formula(raw.get("calculate_output"), parts)

    def grade(rows: Sequence[Graded]) -> list[float]:
        columns = {key: part.grade(rows) for key, part in parts.items()}
        return [
            _computed(formula, {key: column[i] for key, column in columns.items()}, graded.example.line)
            for i, graded in enumerate(rows)
        ]

    return Grader(name, False, grade, tuple(judge for part in parts.values() for judge in part.judges))


def _computed(formula: Callable[[Mapping[str, float]], float], scores: Mapping[str, float], line: int) -> float:
    told = ", ".join(f"{name} = {score:g}" for name, score in scores.items())
    try:
        value = formula(scores)
    except (ArithmeticError, ValueError) as error:
        raise InvalidValue(f"line {line}: calculate_output has no value for {told}: {error}", param="grader") from error
    if not -1e-9 <= value <= 1 + 1e-9:
        raise InvalidValue(
            f"line {line}: calculate_output gave {value:g} for {told}; a score lies between 0 and 1: divide by the "
            "largest value it can have.",
            param="grader",
        )
    return min(1.0, max(0.0, value))


def _passing(raw: dict[str, Any], grader: Grader, where: str, low: float, high: float) -> Grader:
    """With a `pass_threshold`, right or wrong instead of a degree."""
    threshold = raw.get("pass_threshold")
    if threshold is None:
        return grader
    if not _is_number(threshold) or not low <= threshold <= high:
        raise InvalidValue(f"{where}: pass_threshold is a number from {low:g} to {high:g}.", param="grader")
    least = (threshold - low) / (high - low)
    return grader._replace(
        binary=True, grade=lambda rows: [float(score >= least - 1e-12) for score in grader.grade(rows)]
    )


def _judged(reply: str) -> float | None:
    value = json_value(reply)
    if isinstance(value, dict):
        found = [value[key] for key in ("result", "score") if _is_number(value.get(key))]
        return float(found[0]) if found else None
    found_number = number_in(reply)
    return None if found_number is None else float(found_number)


def _turns(given: Any, where: str) -> list[tuple[str, Template]]:
    turns = []
    for position, message in enumerate(given if isinstance(given, list) else []):
        at = f"{where}: input[{position}]"
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise InvalidValue(f"{at}: expected a message with a role and a content.", param="grader")
        turns.append((message["role"], read_template(_text(message.get("content")), f"{at}.content")))
    if not turns:
        raise InvalidValue(f"{where}: input is a list of messages.", param="grader")
    return turns


def _text(content: Any) -> Any:
    """The text of a content in any of the forms that the API has for one; what is none as it is."""
    parts = content if isinstance(content, list) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else content


def _range(given: Any, where: str) -> tuple[float, float]:
    if given is None:
        return 0.0, 1.0
    if not isinstance(given, list) or len(given) != 2 or not all(map(_is_number, given)) or given[0] >= given[1]:
        raise InvalidValue(f"{where}: range is [lowest, highest].", param="grader")
    return float(given[0]), float(given[1])


def _sampling(given: Any, where: str) -> Sampling:
    given = given or {}
    known = ("seed", "top_p", "temperature", "max_completions_tokens", "max_completion_tokens")
    if not isinstance(given, dict) or not given.keys() <= set(known) or not all(map(_is_number, given.values())):
        raise InvalidValue(f"{where}: sampling_params is an object of numbers: {', '.join(known)}.", param="grader")
    room = given.get("max_completions_tokens") or given.get("max_completion_tokens") or JUDGE_TOKENS
    return Sampling(
        max_tokens=int(room),
        temperature=float(given.get("temperature", 0)),
        top_p=float(given.get("top_p", 1)),
        seed=int(given["seed"]) if "seed" in given else None,
    )


def _only(raw: dict[str, Any], keys: Sequence[str], where: str) -> None:
    unknown = raw.keys() - {"type", "name", *keys}
    if unknown:
        raise InvalidValue(
            f"{where}: unknown {', '.join(map(repr, sorted(unknown)))}. A {raw['type']} grader has {', '.join(keys)}.",
            param="grader",
        )


def _one_of(known: Mapping[str, Any], value: Any, where: str) -> Any:
    if not isinstance(value, str) or value not in known:
        raise InvalidValue(f"{where}: {value!r} is not one of {', '.join(known)}.", param="grader")
    return known[value]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def grader_json(grader: str | Path | dict[str, Any]) -> dict[str, Any]:
    """A grader's JSON: itself, as text, or what is in a file. Raises InvalidValue."""
    if isinstance(grader, dict):
        return grader
    if str(grader).lstrip().startswith("{"):
        return parse_grader(str(grader).encode(), "the grader")
    file = Path(grader)
    if not file.is_file():
        raise InvalidValue(f"There is no file {file}", param="grader")
    return parse_grader(file.read_bytes(), str(file))


def parse_grader(content: bytes, name: str) -> dict[str, Any]:
    """The JSON of a grader's file. Raises InvalidValue."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{name}: no JSON: {error}", param="grader") from error
    if not isinstance(value, dict):
        raise InvalidValue(f'{name}: a grader is a JSON object with a "type".', param="grader")
    return value
