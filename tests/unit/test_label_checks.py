"""Labels nobody taught, named or fits: found where planted, quiet where a file is sound or merely hard."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from heldout.errors import ContextLengthExceeded
from heldout.pipeline.checks.enumerations import listed_labels
from heldout.pipeline.checks.labels import (
    classes_of,
    find_class_imbalance,
    find_rare_and_missing_classes,
    find_unknown_labels,
)
from heldout.pipeline.checks.parts import ModelTools, Parts
from heldout.pipeline.checks.wrong_labels import find_wrong_labels, noise_caveats
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.types import Dataset, Example, Finding

DIRTY = Path(__file__).parents[2].parent / "shared" / "data" / "dirty"
PROMPT = "Which animal is it? Answer with cat, dog, horse or sea_cow."
ANIMALS = ("cat", "dog", "horse", "sea_cow")

#: Words that go with each of eight topics, and words that go with none.
TOPICS = {
    "billing": "invoice charge fee payment receipt amount",
    "delivery": "parcel courier shipped tracking doorstep late",
    "account": "login password profile email username locked",
    "returns": "refund return exchange damaged broken wrong",
    "hours": "open closed weekend holiday evening morning",
    "jobs": "apply vacancy salary interview career position",
    "press": "journalist interview article photo logo statement",
    "legal": "contract privacy terms liability consent notice",
}
FILLERS = "please could you tell me about the my a is there any with for I need to know what how soon".split()


def dataset(answers: Iterable[str], texts: Sequence[str] = (), system: str = PROMPT, name: str = "t.jsonl") -> Dataset:
    def row(line: int, answer: str) -> Example:
        messages = (
            {"role": "system", "content": system},
            {"role": "user", "content": texts[line - 1] if texts else f"question {line}"},
            {"role": "assistant", "content": answer},
        )
        return Example(messages=messages, weights=(0, 0, 1), line=line)

    return Dataset(name=name, examples=tuple(row(line, answer) for line, answer in enumerate(answers, start=1)))


def animals(n: int = 60) -> list[str]:
    return [ANIMALS[i % 4] for i in range(n)]


Check = Callable[[Parts], Iterable[Finding]]


def found(check: Check, train: Dataset, **parts: Any) -> dict[str, Finding]:
    return {finding.code: finding for finding in check(Parts(train=train, **parts))}


# Labels that the prompt lists


@pytest.mark.parametrize(
    "prompt",
    [
        "Answer with one of: cat, dog, horse, sea_cow, zebra.",
        "Labels are cat, dog, horse, sea_cow and zebra. Be brief, please.",
        'Say {"animal": "cat"}, {"animal": "dog"}, {"animal": "horse"}, {"animal": "sea_cow"} or {"animal": "zebra"}.',
        "Choose a class:\n- cat: it meows\n- dog: it barks (often)\n- horse\n- sea_cow: a manatee\n- zebra: striped",
        "Choose:\n1. cat\n2. dog\n3. horse\n4. zebra\n5. sea_cow\n\nAnswer with the word only.",
        "Output: cat|dog|horse|zebra|sea_cow",
        "Class (cat / dog / horse / zebra / sea_cow):",
        '"animal" must be one of "cat", "zebra", "dog", "horse", "sea_cow"; "sure" is true or false.',
    ],
)
def test_a_label_that_is_listed_and_never_given_is_missing(prompt: str):
    assert set(listed_labels(prompt, ANIMALS)) == {*ANIMALS, "zebra"}
    finding = found(find_rare_and_missing_classes, dataset(animals(), system=prompt))["missing_class"]
    assert finding.severity == "warning"
    assert "'zebra'" in finding.message


@pytest.mark.parametrize(
    "prompt",
    [
        "Is it a cat, dog, horse or sea_cow? Answer briefly, in lower case.",
        "cat, dog, horse or sea_cow, please.",
        "Answer with the animal.\n\n- Be brief.\n- Do not explain.",
        "A cat is small. A dog barks. A horse can be ridden. A sea_cow swims, slowly, far.",
        "Please, yes, answer: cat, dog, horse or sea_cow. Nothing else, ever.",
    ],
)
def test_other_words_of_a_prompt_are_no_labels(prompt: str):
    assert set(listed_labels(prompt, ANIMALS)) <= set(ANIMALS)


def test_labels_of_several_words_are_listed_too():
    labels = ["lost card", "stolen card", "card not working"]
    prompt = "One of: lost card, stolen card, new card, card not working. Use only these, in lower case."
    assert set(listed_labels(prompt, labels)) == {*labels, "new card"}


# Unknown labels


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("odd", ["Cat", "seacow", "doge", "tiger", "", "none of them"])
def test_a_label_that_the_prompt_does_not_list_is_unknown(odd: str, as_json: bool):
    answers = animals()
    answers[11] = odd
    train = dataset([json.dumps({"animal": answer}) if as_json else answer for answer in answers])
    finding = found(find_unknown_labels, train)["unknown_label"]
    assert (finding.severity, finding.lines) == ("warning", (12,))


def test_a_slip_of_the_pen_names_what_was_meant():
    answers = animals()
    answers[11] = "sea_cwo"
    assert "meant is perhaps 'sea_cow'" in found(find_unknown_labels, dataset(answers))["unknown_label"].message


def test_a_label_named_outside_the_list_is_known():
    answers = animals()
    answers[3] = answers[9] = answers[10] = "other"
    assert not found(find_unknown_labels, dataset(answers, system=PROMPT + " Say other when it is none of these."))


def test_a_frequent_label_that_the_prompt_forgot_is_a_note():
    finding = found(find_unknown_labels, dataset([*animals(), *["tiger"] * 15]))
    assert set(finding) == {"unlisted_label"}
    assert finding["unlisted_label"].severity == "note"


def test_without_a_list_only_another_spelling_of_a_frequent_label_is_unknown():
    answers = animals()
    answers[0], answers[2] = "CAT", "tiger"
    finding = found(find_unknown_labels, dataset(answers, system="Which animal?"))["unknown_label"]
    assert finding.lines == (1,)


def test_two_frequent_labels_a_letter_apart_are_noted():
    answers = [("cancelled", "canceled", "open", "level_1", "level_2")[i % 5] for i in range(60)]
    finding = found(find_unknown_labels, dataset(answers, system=""))["similar_labels"]
    assert finding.severity == "note"
    assert "'canceled'" in finding.message
    assert "level" not in finding.message
    listed = dataset(answers, system="One of: cancelled, canceled, open, level_1, level_2.")
    assert not found(find_unknown_labels, listed)


def test_texts_and_records_are_no_labels():
    assert classes_of(dataset(f"text {i}" for i in range(100))) is None
    assert classes_of(dataset(json.dumps({"a": i % 3, "b": 1}) for i in range(100))) is None
    refusals = ["I cannot help with that."] * 85 + [f"Sure, it is {i}." for i in range(15)]
    assert classes_of(dataset(refusals)) is None


# Rare and frequent classes


def test_a_class_of_one_or_two_rows_is_rare():
    answers = ["cat", "dog", "horse"] * 15 + ["sea_cow"] * 2
    finding = found(find_rare_and_missing_classes, dataset(answers))["rare_class"]
    assert finding.lines == (46, 47)
    assert not found(find_rare_and_missing_classes, dataset([*answers, "sea_cow"]))


def test_an_unknown_label_is_not_rare_as_well():
    answers = animals()
    answers[5] = "tiger"
    assert not found(find_rare_and_missing_classes, dataset(answers))


def test_a_swamping_class_is_a_note_and_a_vanishing_one_a_warning():
    assert not found(find_class_imbalance, dataset(["cat"] * 60 + ["dog"] * 40))
    assert found(find_class_imbalance, dataset(["cat"] * 90 + ["dog"] * 10))["majority_class"].severity == "note"
    finding = found(find_class_imbalance, dataset(["cat"] * 96 + ["dog"] * 4))["class_imbalance"]
    assert (finding.severity, finding.lines) == ("warning", (97, 98, 99, 100))


def test_a_slip_is_no_class_that_others_drown():
    answers = ["cat", "dog"] * 30 + ["Cat"]
    assert not found(find_class_imbalance, dataset(answers))


# Labels that do not fit


def tickets(
    n: int, wrong: float = 0.0, topics: Sequence[str] = tuple(TOPICS), hard: float = 0.0
) -> tuple[Dataset, set[int]]:
    """n texts, the share of `wrong` with another topic's label; a `hard` one has words of its neighbour as well."""
    rng = random.Random(7)
    texts, labels, lines = [], [], set()
    for line in range(1, n + 1):
        at = rng.randrange(len(topics))
        words = rng.sample(TOPICS[topics[at]].split(), 2) + rng.sample(FILLERS, 6)
        if rng.random() < hard:
            words += rng.sample(TOPICS[topics[at ^ 1]].split(), 2)
        rng.shuffle(words)
        label = topics[at]
        if rng.random() < wrong:
            label = rng.choice([topic for topic in topics if topic != label])
            lines.add(line)
        texts.append(" ".join(words))
        labels.append(json.dumps({"topic": label}))
    return dataset(labels, texts, system="Name the topic."), lines


def test_wrong_labels_are_found_and_the_share_is_estimated():
    train, wrong = tickets(400, wrong=0.2)
    findings = found(find_wrong_labels, train)
    named = set(findings["wrong_label"].lines)
    assert len(named & wrong) >= 0.85 * len(wrong)
    assert len(named & wrong) >= 0.85 * len(named)
    assert findings["label_noise"].severity == findings["wrong_label"].severity == "warning"
    share = int(findings["label_noise"].message.removeprefix("About ").partition("%")[0])
    assert 14 <= share <= 26  # 20 % are wrong


def test_a_verdict_on_rows_of_a_noisy_file_says_so_first():
    noisy = tuple(find_wrong_labels(Parts(train=tickets(400, wrong=0.2)[0])))
    (caveat,) = noise_caveats(noisy, holdout_given=False)
    assert "those of the rows held out of it: good" in caveat
    assert noise_caveats(noisy, holdout_given=True) == ()
    clean = tuple(find_wrong_labels(Parts(train=tickets(400, wrong=0.01)[0])))
    assert noise_caveats(clean, holdout_given=False) == ()


def test_the_most_suspicious_line_comes_first_with_the_label_that_the_others_say():
    train, wrong = tickets(400, wrong=0.01)
    finding = found(find_wrong_labels, train)["wrong_label"]
    assert finding.severity == "note"
    first = finding.message.partition("(line ")[2]
    assert int(first.partition(":")[0]) in wrong
    assert ", the others say '" in first


@pytest.mark.parametrize("hard", [0.0, 0.5, 1.0])
def test_a_hard_task_is_not_called_noisy(hard: float):
    train, _ = tickets(400, hard=hard)
    findings = found(find_wrong_labels, train)
    assert all(finding.severity == "note" for finding in findings.values())
    assert "label_noise" not in findings


def test_shuffled_labels_are_one_finding_about_the_file():
    train, _ = tickets(300, wrong=1 - 1 / 8)
    findings = found(find_wrong_labels, train)
    assert set(findings) == {"label_noise"}
    assert findings["label_noise"].severity == "warning"
    assert "cannot be predicted" in findings["label_noise"].message


def test_with_few_labels_hard_and_noisy_look_alike_and_nothing_is_claimed():
    train, _ = tickets(300, wrong=0.2, topics=("billing", "delivery"))
    assert all(finding.severity == "note" for finding in found(find_wrong_labels, train).values())


def test_rows_that_contradict_each_other_are_left_to_the_check_for_that():
    train, _ = tickets(300)
    sound = [row for row in train.examples if "legal" not in row.target]
    other = {"role": "assistant", "content": '{"topic": "legal"}'}
    wrong = [Example(messages=(*row.prompt, other), weights=row.weights, line=row.line + 300) for row in sound[:3]]

    def named(*rows: Example) -> set[int]:
        dataset = Dataset(name="t.jsonl", examples=rows)
        return {line for finding in found(find_wrong_labels, dataset).values() for line in finding.lines}

    theirs = {row.line for row in wrong}
    assert named(*wrong, *(row for row in train.examples if row not in sound[:3])) & theirs
    assert not named(*wrong, *train.examples) & theirs


def test_an_encoder_is_asked_and_one_that_cannot_read_is_done_without():
    train, wrong = tickets(300, wrong=0.2)
    asked: list[int] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(len(texts))
        return [[float(any(word in text for word in words.split())) for words in TOPICS.values()] for text in texts]

    def refuse(texts: Sequence[str]) -> list[list[float]]:
        raise ContextLengthExceeded("too long")

    with_encoder = found(find_wrong_labels, train, model=ModelTools(embed=embed))["wrong_label"]
    assert asked == [300]
    assert len(wrong & set(with_encoder.lines)) >= 0.9 * len(wrong)
    without = found(find_wrong_labels, train)
    assert found(find_wrong_labels, train, model=ModelTools(embed=refuse)) == without


def test_small_files_and_texts_without_a_word_in_common_are_no_error():
    assert not found(find_wrong_labels, tickets(30)[0])
    answers = [ANIMALS[i % 4] for i in range(80)]
    found(find_wrong_labels, dataset(answers, [f"w{i}" for i in range(80)]))
    found(find_wrong_labels, dataset(answers, ["" for _ in range(80)]))


@pytest.mark.skipif(not DIRTY.exists(), reason="../shared/data is not beside this checkout")
def test_a_third_of_wrong_labels_on_real_texts():
    train = read_dataset((DIRTY / "label_noise30.jsonl").read_bytes(), name="label_noise30.jsonl")[0]
    wrong = set(json.loads((DIRTY / "label_noise30.expected.json").read_text())["lines_with_defects"])
    findings = found(find_wrong_labels, train)
    named = set(findings["wrong_label"].lines)
    assert len(named & wrong) >= 0.65 * len(wrong)
    assert len(named & wrong) >= 0.55 * len(named)
    assert "label_noise" in findings
