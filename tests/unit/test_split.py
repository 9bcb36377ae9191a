"""Splitting: no prompt in two parts, nothing lost, the same every time."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from heldout.errors import InvalidHoldoutFile, InvalidTrainingFile, InvalidValidationFile
from heldout.pipeline.checks.groups import fingerprint, prompt_fingerprint, shown_prompts
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.folds import is_small, split_into_folds
from heldout.pipeline.split import allocate, part_sizes, split_dataset
from heldout.pipeline.types import Dataset, Example, Finding, Split

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside this checkout")
ROLES = ("user", "assistant")


def conversation(turns: list[str], line: int) -> Example:
    """User and assistant by turns; all answers are learned."""
    messages = tuple({"role": ROLES[n % 2], "content": text} for n, text in enumerate(turns))
    return Example(messages=messages, weights=tuple(n % 2 for n in range(len(turns))), line=line)


def dataset(*rows: list[str], name: str = "train.jsonl") -> Dataset:
    return Dataset(name=name, examples=tuple(conversation(row, n) for n, row in enumerate(rows, start=1)))


def numbered(n: int, *, start: int = 0, name: str = "train.jsonl") -> Dataset:
    return dataset(*([f"question {i}", f"answer {i}"] for i in range(start, start + n)), name=name)


def asked(rows: tuple[Example, ...]) -> set[str]:
    return {prompt_fingerprint(row.prompt) for row in rows}


def shown(rows: tuple[Example, ...]) -> set[str]:
    return set().union(*(shown_prompts(row) for row in rows))


def lines(rows: tuple[Example, ...]) -> list[int]:
    return [row.line for row in rows]


def removed(findings: tuple[Finding, ...], file: str) -> list[int]:
    return [line for finding in findings if finding.file == file for line in finding.lines]


def assert_disjoint(split: Split) -> None:
    assert not asked(split.holdout) & shown(split.train)
    assert not asked(split.holdout) & shown(split.valid)
    assert not asked(split.valid) & shown(split.train)
    assert split.train
    assert split.valid
    assert split.holdout


def random_rows(rng: random.Random, n: int, pool: int) -> list[list[str]]:
    """Rows with repeated prompts, conflicting answers, other spellings and conversations that share turns."""
    rows = []
    for _ in range(n):
        turns = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            prompt = f"question {rng.randrange(pool)}"
            turns += [rng.choice((prompt, prompt.upper(), f" {prompt}?")), f"label {rng.randrange(3)}"]
        rows.append(turns)
    return rows


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("given", ["", "valid", "holdout", "valid holdout"])
def test_random_data_is_split_into_disjoint_parts_and_nothing_is_lost(seed: int, given: str):
    rng = random.Random(seed)
    pool = rng.choice((60, 200, 1000))
    train = dataset(*random_rows(rng, rng.randrange(40, 500), pool))
    valid, holdout = (
        # One row of its own, so that the file cannot leak completely.
        dataset(*random_rows(rng, 60, pool), [f"only in {name}", "label 1"], name=name) if name in given else None
        for name in ("valid", "holdout")
    )
    split, findings = split_dataset(train, valid, holdout, seed=seed)
    assert_disjoint(split)
    from_train = [split.train]
    for part, source in ((split.valid, valid), (split.holdout, holdout)):
        if source is None:
            from_train.append(part)
        else:
            all_lines = lines(source.examples)
            assert sorted(lines(part) + removed(findings, source.name)) == all_lines
    kept = [line for part in from_train for line in lines(part)]
    assert sorted(kept + removed(findings, train.name)) == lines(train.examples)
    for part in (split.train, split.valid, split.holdout):
        assert lines(part) == sorted(lines(part)), "the file's order"


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    train = numbered(100)
    first, again, other = (split_dataset(train, None, None, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.holdout != other.holdout


def test_the_split_does_not_depend_on_the_process():
    program = (
        "from heldout.pipeline.split import split_dataset; from heldout.pipeline.types import *\n"
        "def row(n): return ({'role': 'user', 'content': f'q{n}'},"
        " {'role': 'assistant', 'content': f'label {n % 3}'})\n"
        "rows = tuple(Example(messages=row(n), weights=(0, 1), line=n) for n in range(60))\n"
        "split, _ = split_dataset(Dataset(name='a', examples=rows), None, None, seed=7)\n"
        "print([row.line for row in split.holdout], [row.line for row in split.valid])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    # Pinned: a job that is resumed on another Python must find the rows it left.
    holdout = "[0, 8, 10, 11, 12, 16, 19, 22, 24, 29, 30, 40, 45, 50, 53]"
    valid = "[18, 21, 28, 31, 39, 46, 47, 51, 56, 59]"
    assert outputs == {f"{holdout} {valid}\n"}


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (10, (3, 2)),
        (20, (5, 5)),
        (40, (10, 10)),
        (100, (25, 15)),
        (299, (74, 44)),
        (300, (150, 40)),
        (999, (150, 119)),
        (1000, (200, 100)),
        (5000, (500, 200)),
    ],
)
def test_sizes_follow_the_number_of_groups(n: int, sizes: tuple[int, int]):
    assert part_sizes(n, holdout=True, valid=True) == sizes


def test_only_what_is_not_given_is_split_off():
    train, valid, holdout = (
        numbered(100),
        numbered(20, start=200, name="v"),
        numbered(40, start=300, name="h"),
    )
    split, _ = split_dataset(train, valid, None, seed=0)
    assert (len(split.train), len(split.valid), len(split.holdout)) == (75, 20, 25)
    assert split.sources == {
        "train": "the rest of train.jsonl",
        "valid": "validation file v",
        "holdout": "split from train.jsonl",
    }
    split, _ = split_dataset(train, None, holdout, seed=0)
    assert (len(split.train), len(split.valid), len(split.holdout)) == (85, 15, 40)
    split, findings = split_dataset(train, valid, holdout, seed=0)
    assert split.train == train.examples
    assert split.valid == valid.examples
    assert split.holdout == holdout.examples
    assert split.sources["train"] == "training file train.jsonl"
    assert findings == ()


def test_leaking_rows_are_left_out_of_the_given_files_and_listed():
    train = numbered(40)
    valid = dataset(["Question 3?", "x"], ["new", "x"], ["shared", "x"], name="v")
    holdout = dataset(["question 39", "x"], ["Shared", "y"], name="h")
    split, findings = split_dataset(train, valid, holdout, seed=0)
    assert split.train == train.examples
    assert lines(split.valid) == [2]
    assert lines(split.holdout) == [2]
    assert [(finding.code, finding.file, finding.lines) for finding in findings] == [
        ("leak_removed", "h", (1,)),
        ("leak_removed", "v", (1, 3)),
    ]


def test_a_validation_row_that_shows_a_holdout_prompt_in_an_earlier_turn_is_left_out():
    valid = dataset(["shared", "x", "more", "y"], ["new", "x"], name="v")
    split, _ = split_dataset(numbered(40), valid, dataset(["shared", "x"], name="h"), seed=0)
    assert lines(split.valid) == [2]


def test_duplicates_stay_in_train_and_count_once_elsewhere():
    train = dataset(*[[f"question {n % 20}", "x"] for n in range(60)])
    valid = dataset(["v", "x"], ["V ", "X"], ["v", "y"], name="v")
    split, findings = split_dataset(train, valid, None, seed=0)
    assert split.groups == 20
    assert len(split.holdout) == 10
    assert len(split.train) == 30
    assert lines(split.valid) == [1, 3], "another answer is no repetition"
    assert len(removed(findings, "train.jsonl")) == 20


def test_labels_keep_their_shares_and_a_rare_label_stays_learnable():
    rows = [[f"q{n}", "common"] for n in range(180)] + [[f"r{n}", "rare"] for n in range(20)] + [["s", "single"]]
    for seed in range(5):
        split, _ = split_dataset(dataset(*rows), None, None, seed=seed)
        assert Counter(row.target for row in split.holdout) == {"common": 45, "rare": 5}
        assert Counter(row.target for row in split.valid) == {"common": 27, "rare": 3}
        assert "single" in {row.target for row in split.train}


def test_places_are_shared_by_largest_remainder():
    assert allocate({"a": 50, "b": 30, "c": 20}, 10) == {"a": 5, "b": 3, "c": 2}
    assert allocate({"a": 7, "b": 7, "c": 6}, 10) == {"a": 4, "b": 3, "c": 3}
    assert allocate({"a": 10, "b": 1, "c": 1}, 9) == {"a": 9, "b": 0, "c": 0}


@pytest.mark.parametrize("seed", range(20))
def test_places_add_up_and_leave_one_of_each(seed: int):
    rng = random.Random(seed)
    sizes = {str(n): rng.randrange(1, 30) for n in range(rng.randrange(1, 20))}
    k = rng.randrange(sum(sizes.values()) - len(sizes) + 1)
    shares = allocate(sizes, k)
    assert sum(shares.values()) == k
    assert all(0 <= shares[name] < sizes[name] for name in sizes)


@pytest.mark.parametrize("n", range(4, 40))
def test_a_small_file_still_gives_three_parts_and_keeps_half_for_training(n: int):
    split, _ = split_dataset(numbered(n), None, None, seed=0)
    assert_disjoint(split)
    assert len(split.train) * 2 >= n


@pytest.mark.parametrize("rows", [[], [["a", "b"]] * 20, [["a", "b"], ["c", "d"], ["e", "f"]]])
def test_a_file_with_too_few_prompts_is_refused_in_a_sentence(rows: list[list[str]]):
    with pytest.raises(InvalidTrainingFile, match=r"train\.jsonl has .* different prompts: too few"):
        split_dataset(dataset(*rows), None, None, seed=0)


def test_an_empty_training_file_is_refused_even_with_the_other_files():
    with pytest.raises(InvalidTrainingFile, match="no examples"):
        split_dataset(numbered(0), numbered(20, start=50), numbered(20, start=90), seed=0)


def test_files_that_leak_completely_are_refused_by_name():
    train = numbered(40)
    with pytest.raises(InvalidValidationFile, match=r"v\.jsonl has no row"):
        split_dataset(train, numbered(20, name="v.jsonl"), None, seed=0)
    with pytest.raises(InvalidHoldoutFile, match=r"h\.jsonl has no row"):
        split_dataset(train, None, numbered(20, name="h.jsonl"), seed=0)


def test_a_part_of_a_conversation_is_not_held_out_when_the_whole_is_trained_on():
    rows = [[f"topic {n}", "a", "more", "b"][:length] for n in range(100) for length in (2, 4)]
    for seed in range(5):
        split, findings = split_dataset(dataset(*rows), None, None, seed=seed)
        assert_disjoint(split)
        assert not findings, "rows that must move go to train, none is left out"
        assert len(split.holdout) >= 20


@needs_data
def test_the_leaking_lines_of_real_data_are_left_out():
    folder = DATA / "dirty"
    train, valid = (
        read_dataset((folder / name).read_bytes(), name=name)[0]
        for name in ("leakage.jsonl", "leakage.validation.jsonl")
    )
    split, findings = split_dataset(train, valid, None, seed=0)
    assert_disjoint(split)
    assert {12, 60, 64, 49, 28} <= set(removed(findings, valid.name))


@needs_data
@pytest.mark.parametrize("folder", sorted(DATA.glob("tasks/*/")), ids=lambda folder: folder.name)
def test_real_tasks_are_split_without_losing_a_row(folder: Path):
    train = read_dataset((folder / "train.jsonl").read_bytes(), name="train.jsonl")[0]
    split, findings = split_dataset(train, None, None, seed=3)
    assert_disjoint(split)
    n = len(split.train) + len(split.valid) + len(split.holdout) + len(removed(findings, train.name))
    assert n == len(train)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("given", [False, True])
def test_every_row_of_random_data_is_held_out_in_one_fold_and_nothing_of_it_is_trained_on_there(seed: int, given: bool):
    rng = random.Random(seed)
    train = dataset(*random_rows(rng, rng.randrange(20, 300), rng.choice((60, 200, 1000))))
    valid = dataset(*random_rows(rng, 30, 1000), ["only in valid", "label 1"], name="valid") if given else None
    folds, findings = split_into_folds(train, valid, seed=seed)
    for split in folds.splits:
        assert_disjoint(split)
        assert lines(split.holdout) == sorted(lines(split.holdout)), "the file's order"
        if not given:
            # A fold loses nothing but rows that are in it already.
            parts = (*split.train, *split.valid, *split.holdout)
            assert len(set(lines(parts))) == len(parts)
            assert {fingerprint(row.messages) for row in parts} == {fingerprint(row.messages) for row in train.examples}
        else:
            assert split.valid == folds.whole.valid
    held = [line for split in folds.splits for line in lines(split.holdout)]
    left_out = set(removed(findings, train.name))
    assert len(held) == len(set(held)), "no row is answered twice"
    assert set(held) | left_out == set(lines(train.examples))
    assert not set(held) & left_out
    assert folds.groups == len({prompt_fingerprint(row.prompt) for row in train.examples if row.line in held})
    assert folds.whole.train == train.examples
    assert folds.whole.holdout == ()


def test_the_folds_do_not_depend_on_the_process():
    program = (
        "from heldout.pipeline.folds import split_into_folds; from heldout.pipeline.types import *\n"
        "def row(n): return ({'role': 'user', 'content': f'q{n}'},"
        " {'role': 'assistant', 'content': f'label {n % 3}'})\n"
        "rows = tuple(Example(messages=row(n), weights=(0, 1), line=n) for n in range(30))\n"
        "folds, _ = split_into_folds(Dataset(name='a', examples=rows), None, seed=7)\n"
        "print([[row.line for row in part] for one in folds.splits[:2] for part in (one.holdout, one.valid)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    # Pinned: a job that is resumed must find the folds it finished.
    first = "[2, 6, 16, 21, 25, 26], [3, 7, 8, 9, 17, 18, 19, 20, 27, 28]"
    second = "[5, 11, 18, 19, 24, 28], [1, 6, 9, 15, 17, 20, 21, 22, 25, 26]"
    assert outputs == {f"[{first}, {second}]\n"}


def test_another_seed_makes_other_folds():
    train = numbered(100)
    first, again, other = (split_into_folds(train, None, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.splits[0].holdout != other.splits[0].holdout


def test_folds_are_equally_large_and_keep_the_shares_of_labels():
    rows = [[f"q{n}", "common"] for n in range(60)] + [[f"r{n}", "rare"] for n in range(15)] + [["s", "single"]]
    folds, _ = split_into_folds(dataset(*rows), None, seed=0)
    assert sorted(len(split.holdout) for split in folds.splits) == [15, 15, 15, 15, 16]
    for split in folds.splits:
        held = Counter(row.target for row in split.holdout)
        assert (held["common"], held["rare"]) == (12, 3)
        # 15 % of what is left, at least 10.
        assert Counter(row.target for row in split.valid) == {"common": 8, "rare": 2}


def test_the_rows_of_a_conversation_are_held_out_together():
    rows = [[f"topic {n}", "a", "more", "b"][:length] for n in range(50) for length in (2, 4)]
    folds, findings = split_into_folds(dataset(*rows), None, seed=0)
    assert findings == ()
    assert sum(len(split.holdout) for split in folds.splits) == 100
    for split in folds.splits:
        assert_disjoint(split)
        topics = Counter(row.messages[0]["content"] for row in split.holdout)
        assert set(topics.values()) == {2}


def test_an_opening_that_all_conversations_share_is_trained_on_and_not_scored():
    # Holding it out would mean training on nothing.
    rows = [["hello", "hi"], *([f"hello{'.' * (n % 3)}", "hi", f"question {n}", "a"] for n in range(60))]
    folds, findings = split_into_folds(dataset(*rows), None, seed=0)
    assert [(finding.code, finding.lines) for finding in findings] == [("never_held_out", (1,))]
    assert folds.groups == 60
    for split in folds.splits:
        assert_disjoint(split)
        assert 1 in lines(split.train)


def test_what_an_unscored_row_answers_in_an_earlier_turn_is_not_scored_either():
    # The others do not learn (weight 0) the answer to "hello", so that "hello" alone could be held out.
    def row(turns: list[str], weights: tuple[int, ...], line: int) -> Example:
        return replace(conversation(turns, line), weights=weights)

    opening = ["hello", "hi", "what do you sell", "pots"]
    others = [row([*opening, f"question {n}", "a"], (0, 0, 0, 1, 0, 1), n) for n in range(3, 63)]
    rows = (conversation(["hello", "hi"], 1), conversation(opening, 2), *others)
    folds, findings = split_into_folds(Dataset(name="train.jsonl", examples=rows), None, seed=0)
    assert removed(findings, "train.jsonl") == [1, 2]
    for split in folds.splits:
        assert_disjoint(split)
        assert {1, 2} <= set(lines(split.train))


def test_a_given_validation_file_stops_every_fold_less_what_it_gives_away():
    valid = dataset(["Question 3?", "x"], ["new", "x"], ["question 7", "x", "more", "y"], name="v")
    folds, findings = split_into_folds(numbered(40), valid, seed=0)
    assert {tuple(lines(split.valid)) for split in folds.splits} == {(2,)}
    assert [(len(split.train), len(split.holdout)) for split in folds.splits] == [(32, 8)] * 5
    assert lines(folds.whole.valid) == [2]
    assert removed(findings, "v") == [1, 3]
    with pytest.raises(InvalidValidationFile, match="v has no row"):
        split_into_folds(numbered(40), numbered(20, name="v"), seed=0)


@pytest.mark.parametrize("n", range(5, 60))
def test_folds_of_a_small_file_keep_half_of_the_rest_for_training(n: int):
    folds, _ = split_into_folds(numbered(n), None, seed=0)
    for split in folds.splits:
        assert_disjoint(split)
        assert len(split.train) >= len(split.valid)


def test_fewer_prompts_than_folds_are_refused_in_a_sentence():
    with pytest.raises(InvalidTrainingFile, match=r"20 rows with 4 different prompts: too few"):
        split_into_folds(dataset(*[[f"question {n % 4}", "x"] for n in range(20)]), None, seed=0)


@pytest.mark.parametrize(("n", "small"), [(299, True), (300, False)])
def test_a_file_is_small_by_its_distinct_prompts(n: int, small: bool):
    assert is_small(dataset(*[[f"question {i % n}", "x"] for i in range(400)])) is small


MUSEUM = "engine whistle platform ticket sleeper carriage tunnel viaduct signal guard steam coal boiler track".split()


def letters(n: int, *, seed: int = 0, of: int = 9) -> list[str]:
    """Texts of which no two are alike."""
    rng = random.Random(seed)
    return [
        " ".join(f"{rng.choice(MUSEUM)}{rng.choice('abcdefgh')}{rng.choice('xyzuvw')}" for _ in range(of))
        for _ in range(n)
    ]


def part_of(split: Split) -> dict[int, str]:
    """Which part a line is in."""
    return {row.line: name for name in ("train", "valid", "holdout") for row in getattr(split, name)}


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_in_one_part(seed: int):
    texts = letters(120)
    rows = [[text, "a"] for text in texts] + [[f"{text} please", "a"] for text in texts]
    split, findings = split_dataset(dataset(*rows), None, None, seed=seed)
    parts = part_of(split)
    assert all(parts[line] == parts[line + 120] for line in range(1, 121))
    assert findings == ()
    assert (len(split.holdout), len(split.valid)) == (60, 36), "as many as without groups"
    folds, _ = split_into_folds(dataset(*rows), None, seed=seed)
    for one in folds.splits:
        parts = part_of(one)
        assert all(parts[line] == parts[line + 120] for line in range(1, 121))


def test_questions_about_one_document_are_in_one_part():
    documents = letters(30, of=40)
    rows = [
        [f"{text}\n\n{question}", "a"]
        for text, questions in zip(documents, zip(*[iter(letters(120, seed=1))] * 4, strict=True), strict=True)
        for question in questions
    ]
    for shape in (lambda text: text, lambda text: text.replace("\n\n", " "), lambda text: f"{text} Thanks"):
        shaped = [[shape(text), answer] for text, answer in rows]
        split, findings = split_dataset(dataset(*shaped), None, None, seed=0)
        parts = part_of(split)
        assert all(len({parts[4 * n + k] for k in range(1, 5)}) == 1 for n in range(30))
        assert findings == ()


def test_a_long_instruction_in_every_prompt_is_no_document():
    instruction = "Read the letter below with care and say in one word which desk of the museum answers it. " * 4
    rows = [[f"{instruction}\n{text}", "a"] for text in letters(100, of=60)]
    split, findings = split_dataset(dataset(*rows), None, None, seed=0)
    assert len(split.holdout) == 25
    assert findings == ()


def test_declared_groups_are_in_one_part():
    rows = [replace(conversation([text, "a"], n), group=f"customer {n % 20}") for n, text in enumerate(letters(100))]
    train = Dataset(name="train.jsonl", examples=tuple(rows))
    split, _ = split_dataset(train, None, None, seed=3)
    groups = [{row.group for row in part} for part in (split.train, split.valid, split.holdout)]
    assert sum(map(len, groups)) == 20
    assert len(split.holdout) == 25
    folds, _ = split_into_folds(train, None, seed=3)
    assert all({row.group for row in one.holdout}.isdisjoint(row.group for row in one.train) for one in folds.splits)


def test_a_declared_group_that_is_too_large_is_trained_on_and_told():
    rows = [
        replace(conversation([text, "a"], n), group="big" if n <= 70 else None)
        for n, text in enumerate(letters(100), start=1)
    ]
    split, (finding,) = split_dataset(Dataset(name="t", examples=tuple(rows)), None, None, seed=0)
    assert (finding.code, finding.severity, len(finding.lines)) == ("group_not_held_out", "note", 70)
    assert {row.group for row in (*split.valid, *split.holdout)} == {None}


def test_lookalikes_that_are_most_of_the_file_are_divided_by_prompt_and_told():
    base = letters(1, of=20)[0]
    alike = [[f"{base} {word}", "a"] for word in letters(60, seed=2, of=2)]
    others = [[text, "a"] for text in letters(60, seed=1)]
    split, findings = split_dataset(dataset(*alike, *others), None, None, seed=0)
    (finding,) = findings
    assert (finding.code, finding.severity) == ("group_split", "warning")
    assert len(finding.lines) > 50
    assert_disjoint(split)
    assert len(split.holdout) == len({*lines(split.holdout)}) >= 25


def test_near_leaks_of_given_files_are_left_out_by_name():
    texts = letters(60)
    train = dataset(*([text, "a"] for text in texts))
    valid = dataset(
        [f"Hello, {texts[3]}", "a"], [letters(1, seed=5)[0], "a"], ["held text of the holdout file!", "a"], name="v"
    )
    holdout = dataset([texts[9].upper() + "?!", "b"], ["Held text of the holdout file", "a"], name="h")
    split, findings = split_dataset(train, valid, holdout, seed=0)
    assert (lines(split.valid), lines(split.holdout)) == ([2], [2])
    assert [(one.code, one.file, one.lines) for one in findings] == [
        ("leak_removed", "h", (1,)),
        ("leak_removed", "v", (1, 3)),
    ]
    assert split.caveats == ()


def test_kept_leaks_are_scored_and_mark_the_split():
    train = numbered(60)
    holdout = dataset(*([f"question {n}", "x"] for n in (1, 2, 99)), name="h")
    split, findings = split_dataset(train, None, holdout, seed=0, keep_leaks=True)
    assert lines(split.holdout) == [1, 2, 3]
    (caveat,) = split.caveats
    assert caveat.startswith("2 of 3 holdout rows are, or nearly are, in the training file train.jsonl and were kept")
    assert "the score may measure memory" in caveat
    assert [(one.code, one.severity, one.lines) for one in findings] == [("leak_kept", "warning", (1, 2))]
    folds, _ = split_into_folds(train, numbered(20, name="v"), seed=0, keep_leaks=True)
    assert all(len(one.valid) == 20 for one in folds.splits)
    assert "20 of 20 validation rows" in folds.whole.caveats[0]


def test_forms_of_answers_keep_their_shares_where_answers_are_no_labels():
    answers = [f'{{"name": "{n}"}}' if n % 4 == 0 else f"I found {n} of them" for n in range(200)]
    rows = [list(pair) for pair in zip(letters(200), answers, strict=True)]
    split, _ = split_dataset(dataset(*rows), None, None, seed=0)
    assert sum(row.target.startswith("{") for row in split.holdout) * 4 in range(
        len(split.holdout) - 4, len(split.holdout) + 4
    )


# Validation files that are large beside the training file


@pytest.mark.parametrize(("n", "n_valid", "kept"), [(240, 120, 120), (30, 200, 200), (240, 5000, 200), (800, 600, 500)])
def test_of_a_large_validation_file_rows_are_drawn(n: int, n_valid: int, kept: int) -> None:
    train, valid = numbered(n), numbered(n_valid, start=n, name="valid.jsonl")
    holdout = numbered(40, start=n + n_valid, name="holdout.jsonl")
    split, findings = split_dataset(train, valid, holdout, seed=3)
    assert len(split.valid) == kept
    assert lines(split.valid) == sorted(lines(split.valid)), "in the file's order"
    drawn = [finding for finding in findings if finding.code == "valid_drawn"]
    assert len(drawn) == (kept < n_valid)
    if drawn:
        assert drawn[0].message.startswith(f"{kept} of the {n_valid} rows of valid.jsonl are drawn to stop training by")
        assert min(lines(split.valid)) < n_valid / 10 < n_valid * 0.9 < max(lines(split.valid)), "of the whole file"
        assert split_dataset(train, valid, holdout, seed=3)[0].valid == split.valid
        assert split_dataset(train, valid, holdout, seed=4)[0].valid != split.valid


def test_all_folds_are_stopped_by_the_same_drawn_rows() -> None:
    folds, findings = split_into_folds(numbered(60), numbered(900, start=60, name="valid.jsonl"), seed=1)
    assert all(split.valid == folds.whole.valid for split in folds.splits)
    assert len(folds.whole.valid) == 200
    assert [finding.code for finding in findings].count("valid_drawn") == 1
