"""Forgetting: what the tuned model thinks of the base model's answers, and what the verdict and the report say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.pipeline import report
from heldout.pipeline.evaluate.forgetting import FEWEST, MARGIN, Forgetting, judge_changes, measure_forgetting
from heldout.pipeline.general_facts import FACTS, is_right
from heldout.pipeline.general_prompts import HELD_BACK, REPLAYED
from heldout.pipeline.verdict import Verdict, decide
from heldout.pipeline.watch import Silent
from tests.unit.conftest import right, rung

ADAPTER = "somewhere/adapter"


@dataclass
class Reader:
    """As much of an Engine as the measurement needs. Behind the adapter an answer of k tokens loses `loss` nats
    times k; with `ends` answers whole, the others are cut. The base model knows the first `knows` of the short
    questions, the tuned one the first `keeps`."""

    loss: float = 0.0
    ends: int = len(HELD_BACK)
    knows: int = 0
    keeps: int = 0
    asked: list[str] = field(default_factory=list)
    read: dict[str | None, list[list[Message]]] = field(default_factory=dict)
    questions: dict[str | None, list[str]] = field(default_factory=dict)  # the short ones

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        questions = [str(messages[-1]["content"]) for messages in conversations]
        if questions[0] in FACTS:
            self.questions[model.adapter] = questions
            right = list(FACTS)[: self.keeps if model.adapter else self.knows]
            texts = [f"Well, it is {FACTS[one][0].upper()}." if one in right else "No idea." for one in questions]
            return [Reply(text=text, finish_reason="stop", prompt_tokens=5, completion_tokens=5) for text in texts]
        assert model.adapter is None, "the base model's own answers are fixed"
        self.asked += questions
        return [
            Reply(
                text=" ".join(["word"] * (3 + i % 4)),
                finish_reason="stop" if i < self.ends else "length",
                prompt_tokens=5,
                completion_tokens=3 + i % 4,
            )
            for i in range(len(conversations))
        ]

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        self.read[model.adapter] = [list(messages) for messages in conversations]
        lost = self.loss if model.adapter else 0.0
        # Every other answer loses a quarter of a nat per token more, every other one as much less.
        wobble = [0.25 if model.adapter and i % 2 else -0.25 if model.adapter else 0.0 for i in range(len(HELD_BACK))]
        return [
            -(1.0 + lost + wobble[i]) * (len(str(messages[-1]["content"]).split()) + 1)
            for i, messages in enumerate(conversations)
        ]

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


class Listening(Silent):
    """A watch that keeps the sentences."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def message(self, text: str, *, level: str = "info", data: object = None) -> None:
        self.told.append((level, text))


def measure(
    engine: Reader, directory: Path, watch: Listening | None = None, replay_ratio: float = 0.0
) -> Forgetting | None:
    return measure_forgetting(
        engine,  # type: ignore[arg-type]
        "base",
        Path(ADAPTER),
        replay_ratio=replay_ratio,
        directory=directory,
        watch=watch or Listening(),
    )


def judge(forgetting: Forgetting | None) -> Verdict:
    tuned = rung("tuned", right(100, 90), kind="tuned")
    return decide([rung("zero-shot", right(100, 60))], tuned, forgetting=forgetting)


def test_the_change_is_in_nats_per_token_and_every_prompt_weighs_the_same(tmp_path: Path) -> None:
    engine = Reader(loss=1.5)
    found = measure(engine, tmp_path)
    assert found is not None
    assert found.change == pytest.approx(-1.5), "though the answers are of different lengths"
    # 24 changes that are 0.25 off their mean: by hand sqrt(24 * 0.0625 / 23) / sqrt(24).
    assert found.error == pytest.approx(0.05213, abs=1e-5)
    assert found.interval == pytest.approx((-1.5 - 2.0687 * 0.05213, -1.5 + 2.0687 * 0.05213), abs=1e-4)
    assert (found.n, found.asked) == (24, 24)
    assert found.dropped


def test_both_models_read_the_base_models_answers_to_prompts_that_are_never_replayed(tmp_path: Path) -> None:
    engine = Reader()
    measure(engine, tmp_path)
    assert engine.asked == list(HELD_BACK)
    assert not set(engine.asked) & set(REPLAYED)
    assert set(engine.read) == {None, ADAPTER}
    assert engine.read[None] == engine.read[ADAPTER]
    assert engine.read[None][0] == [
        {"role": "user", "content": HELD_BACK[0]},
        {"role": "assistant", "content": "word word word"},
    ]


def test_the_base_models_answers_are_fixed_once(tmp_path: Path) -> None:
    first, again = Reader(), Reader()
    assert measure(first, tmp_path) == measure(again, tmp_path)
    assert again.asked == []
    assert again.questions == {}


def test_short_questions_count_that_the_base_model_answers_right(tmp_path: Path) -> None:
    engine = Reader(knows=20, keeps=5)
    found = measure(engine, tmp_path)
    assert found is not None
    assert (found.known, found.kept) == (20, 5)
    assert engine.questions == {None: list(FACTS), ADAPTER: list(FACTS)[:20]}, "what it never knew it cannot forget"
    assert not set(FACTS) & {*REPLAYED, *HELD_BACK}
    assert (
        "of 20 short questions that the base model answers right, the tuned model answers 25% (95 %" in found.sentence
    )
    few = measure(Reader(knows=FEWEST - 1, keeps=0), tmp_path / "few")
    assert few is not None
    assert few.sentence.endswith(f"of 40 short questions the base model answers {FEWEST - 1} right, too few to lose")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("12", True), ("There are twelve months.", True), ("There are 120.", False), ("TWELVE!", True), ("", False)],
)
def test_an_answer_is_right_when_the_word_stands_in_it(answer: str, right: bool) -> None:
    assert is_right("How many months are in a year?", answer) is right


def test_cut_answers_are_not_read_as_ended(tmp_path: Path) -> None:
    engine = Reader(ends=FEWEST)
    found = measure(engine, tmp_path)
    assert found is not None
    assert (found.n, found.asked) == (FEWEST, 24)
    assert len(engine.read[ADAPTER]) == FEWEST


def test_too_few_whole_answers_measure_nothing_and_that_is_said(tmp_path: Path) -> None:
    engine, watch = Reader(ends=FEWEST - 1), Listening()
    assert measure(engine, tmp_path, watch) is None
    assert engine.read == {}
    level, sentence = watch.told[-1]
    assert level == "warn"
    assert f"base ended {FEWEST - 1} of its 24 answers" in sentence


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [
        ([-MARGIN - 0.3 + wobble for wobble in (0.1, -0.1) * 12], True),
        ([-MARGIN + 0.3 + wobble for wobble in (0.1, -0.1) * 12], False),
        ([-MARGIN - 0.3 + wobble for wobble in (3.0, -3.0) * 12], False),  # by much on average, but not surely
        ([-MARGIN - 0.3] * 10, True),
        ([0.0] * 10, False),  # an adapter that changes nothing
    ],
)
def test_skills_have_dropped_when_they_surely_fell_by_more_than_the_margin(changes: list[float], dropped: bool) -> None:
    assert judge_changes(changes, asked=24, replay_ratio=0.0).dropped == dropped


@pytest.mark.parametrize(("known", "kept", "lost"), [(24, 0, True), (24, 6, True), (24, 8, False), (7, 0, False)])
def test_skills_have_dropped_when_surely_less_than_half_of_what_was_known_is_answered(
    known: int, kept: int, lost: bool
) -> None:
    found = replace(judge_changes([0.0, 0.1] * 12, asked=24, replay_ratio=0.0), known=known, kept=kept)
    assert found.p_dropped < 0.01
    assert found.dropped == lost
    if lost:
        assert judge(found).reasons[-1].startswith("general skills dropped: ")
        assert judge(found).outcome == "ship"


def test_a_drop_is_told_with_a_remedy_and_does_not_change_the_outcome(tmp_path: Path) -> None:
    found = measure(Reader(loss=1.5), tmp_path)
    verdict = judge(found)
    assert verdict.outcome == judge(None).outcome == "ship"
    assert verdict.reasons[:-1] == judge(None).reasons
    assert verdict.reasons[-1].startswith("general skills dropped: on 24 general prompts")
    assert "changed by -1.50 nats per token (95 % interval -1.61 to -1.39)" in verdict.reasons[-1]
    assert "train again with replay_ratio 0.25" in verdict.reasons[-1]


def test_the_remedy_is_not_what_was_already_tried(tmp_path: Path) -> None:
    def reason(ratio: float) -> str:
        return judge(measure(Reader(loss=1.5), tmp_path, replay_ratio=ratio)).reasons[-1]

    assert "replay_ratio 0.25 was not enough" in reason(0.25)
    assert "a larger replay_ratio, a smaller learning_rate" in reason(0.25)
    assert "larger replay_ratio" not in reason(1.0), "there is none"


def test_without_a_drop_the_verdict_has_the_numbers_and_no_sentence(tmp_path: Path) -> None:
    verdict = judge(measure(Reader(), tmp_path))
    assert verdict.reasons == judge(None).reasons
    guardrail = verdict.as_dict()["guardrails"]["forgetting"]
    assert guardrail["change"] == pytest.approx(0.0)
    assert guardrail["dropped"] is False
    assert judge(None).as_dict()["guardrails"] == {}


def test_the_report_tells_of_general_skills_where_they_were_measured(tmp_path: Path) -> None:
    dropped, kept = judge(measure(Reader(loss=1.5), tmp_path)), judge(measure(Reader(), tmp_path))
    assert report.general_skills(judge(None)) == ""
    told = report.general_skills(dropped)
    assert told.startswith("On 24 general prompts that were not trained on")
    assert "They dropped: if the model has to answer more than prompts like yours" in told
    assert "They did not surely drop" in report.general_skills(kept)
