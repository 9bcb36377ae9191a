"""What every consequence is made from, and what it comes to. Formulas and thresholds: docs/consequences.md."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from heldout.engine.base import Engine, Message, ModelRef, Progress, Reply, Sampling
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.forgetting import Forgetting
from heldout.pipeline.evaluate.scores import likely_answers, with_shots
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch

Status = Literal["ok", "warn", "fail", "not_measured"]
Found = TypeVar("Found")

#: Probabilities that an excess beats its margin (SCIENCE §3): several guardrails then cost few good models.
SURE, LIKELY = 0.99, 0.90


@dataclass(frozen=True, kw_only=True)
class Consequence:
    """One thing that training may have made worse. The sentence stands for itself; its numbers are in `numbers`."""

    name: str
    status: Status
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()  # what it looks like, short

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {
            "name": self.name,
            "status": self.status,
            "sentence": self.sentence,
            "numbers": self.numbers,
            "examples": list(self.examples),
        }


#: Of a training's time, what evaluation may take (what begins in time may end later), and what probes have in any case.
AT_MOST, AT_LEAST = 0.95, 0.25
#: And they have so many seconds in any case: a training of few rows, or on a GPU, takes less than there is to ask.
SECONDS = 20.0


def seconds_for_probes(training: float, answering: float) -> float:
    """What probes may take, so that evaluation costs no more than the training.

    Args:
        training: seconds that the training took.
        answering: seconds that the rest of evaluation took: the rungs, the tuned model's answers, general skills. They
            decide the verdict and are not cut, so evaluation is longer where they leave less than AT_LEAST.
    """
    return max(SECONDS, AT_LEAST * training, AT_MOST * training - answering)


class Budget:
    """How long the probes may take, all together. What begins within it may end after it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._began = clock()

    @property
    def used_up(self) -> bool:
        """True when nothing more may begin."""
        return self._clock() - self._began >= self.seconds

    def half(self) -> Budget:
        """Half of what is left, from now on."""
        return Budget(max(0.0, self.seconds - (self._clock() - self._began)) / 2, self._clock)

    @property
    def sentence(self) -> str:
        """Why something was not measured."""
        return f"the time for probes ({self.seconds:.0f} s) was used up; HELDOUT_EVAL_BUDGET gives them more"


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A tuned model that answered rows it never saw: the served one where there is a holdout, one of each fold by
    cross-fitting."""

    model: ModelRef
    split: Split  # its own: what it learned from and was chosen by
    places: range  # of the rows that it answered, among all that were
    shots: tuple[Example, ...]  # that the baseline's prompt shows before these rows
    max_tokens: int  # of an answer, as it was when these rows were answered


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The tuned model and all that is known of it when its consequences are measured."""

    engine: Engine
    model: ModelRef  # that is served
    is_encoder: bool
    split: Split  # of that model
    answered: tuple[Example, ...]  # the examples behind `tuned` and `rungs`, in their order
    metric: Metric
    max_tokens: int  # of an answer
    tuned: Rung
    baseline: Rung  # the best prompt, or the constant answer where that is better
    rungs: tuple[Rung, ...]
    folds: tuple[TunedModel, ...]  # who answered, by cross-fitting; none where the served model did
    forgetting: Forgetting | None
    budget: Budget
    watch: Watch

    @property
    def base(self) -> ModelRef:
        """The model before training."""
        return ModelRef(base_model=self.model.base_model)

    @property
    def seed(self) -> int:
        """Of every sample: the same job asks the same questions."""
        return self.split.seed

    @property
    def models(self) -> tuple[TunedModel, ...]:
        """Whose answers `tuned` and `baseline` hold: of each answered row the model that never saw it."""
        everywhere = range(len(self.answered))
        served = TunedModel(
            model=self.model,
            split=self.split,
            places=everywhere,
            shots=self.baseline.shots,
            max_tokens=self.max_tokens,
        )
        return self.folds or (served,)

    def unseen(self, places: Sequence[int]) -> list[tuple[TunedModel, Example]]:
        """The answered rows at these places, each with the model that never saw it."""
        models = self.models
        return [(next(one for one in models if at in one.places), self.answered[at]) for at in places]

    def learned(
        self, count: int, what: str, part: Literal["train", "valid"] = "train", but: Collection[int] = ()
    ) -> list[tuple[TunedModel, Example]]:
        """At most `count` rows that a model was trained on, or chosen by, each with that model; always the same ones.
        A row that several folds learned is asked of one of them.

        Args:
            but: lines of rows to leave out.
        """
        owners: dict[int, list[tuple[TunedModel, Example]]] = {}
        for one in self.models:
            for row in one.split.train if part == "train" else one.split.valid:
                if row.line not in but:
                    owners.setdefault(row.line, []).append((one, row))
        rows = list(owners)
        chosen = [rows[at] for at in sample(rows, count, self.seed, what)]
        return [random.Random(f"{self.seed}/{what}/{line}").choice(owners[line]) for line in chosen]

    def ask(self, model: ModelRef, prompts: Sequence[Sequence[Message]], stage: str) -> list[Reply]:
        """One model's greedy answers, with progress."""
        return self._chat(model, prompts, (), self.max_tokens, self._tell(stage, 0, len(prompts)))

    def ask_each(
        self, asked: Sequence[tuple[TunedModel, Sequence[Message]]], stage: str, *, baseline: bool = False
    ) -> list[Reply]:
        """Greedy answers to each prompt by its model, or by the baseline with that model's shots; in order."""

        def of_one(one: TunedModel, prompts: list[Sequence[Message]], tell: Progress) -> Sequence[Reply]:
            model, shots = (self.base, one.shots) if baseline else (one.model, ())
            return self._chat(model, prompts, shots, one.max_tokens, tell)

        return self._by_model(asked, of_one, stage)

    def read_each(
        self, asked: Sequence[tuple[TunedModel, Sequence[Message]]], stage: str, *, baseline: bool = False
    ) -> list[float]:
        """How likely each conversation's last answer is to its model, or to the baseline with that model's shots, in
        nats; in order."""

        def of_one(one: TunedModel, conversations: list[Sequence[Message]], tell: Progress) -> Sequence[float]:
            if not baseline:
                return self.engine.log_probs(one.model, conversations, tell)
            behind = [with_shots(conversation, one.shots) for conversation in conversations]
            return self.engine.log_probs(self.base, behind, tell)

        return self._by_model(asked, of_one, stage)

    def _by_model(
        self,
        asked: Sequence[tuple[TunedModel, Sequence[Message]]],
        of_one: Callable[[TunedModel, list[Sequence[Message]], Progress], Sequence[Found]],
        stage: str,
    ) -> list[Found]:
        found: dict[int, Found] = {}
        for one in self.models:
            mine = [i for i, (owner, _) in enumerate(asked) if owner.places == one.places]
            if mine:
                tell = self._tell(stage, len(found), len(asked))
                found.update(zip(mine, of_one(one, [asked[i][1] for i in mine], tell), strict=True))
        return [found[i] for i in range(len(asked))]

    def _chat(
        self,
        model: ModelRef,
        prompts: Sequence[Sequence[Message]],
        shots: Sequence[Example],
        max_tokens: int,
        tell: Progress,
    ) -> list[Reply]:
        was_shown = bool(shots) or model == self.model or model.adapter is not None
        expected = likely_answers(self.split.train, self.metric) if was_shown else ()
        sampling = Sampling(max_tokens=max_tokens, expected=expected)
        return self.engine.chat(model, [with_shots(prompt, shots) for prompt in prompts], sampling, tell)

    def _tell(self, stage: str, before: int, total: int) -> Progress:
        return lambda done, _: self.watch.progress(f"consequences: {stage}", before + done, total)


#: A consequence: from what is known to what came of it.
Measure = Callable[[Subject], Consequence]


def not_measured(name: str, why: str, **numbers: Any) -> Consequence:
    """A consequence that cannot be measured here, with the reason as a clause."""
    return Consequence(name=name, status="not_measured", sentence=f"not measured: {why}", numbers=numbers)


def status_of(*, fails: float = 0.0, warns: float = 0.0) -> Status:
    """From the probabilities that the excess beats the margin of a fail, and that of a warning."""
    return "fail" if fails >= SURE else "warn" if warns >= LIKELY else "ok"


def sample(rows: Sequence[object], count: int, seed: int, what: str) -> list[int]:
    """Places of at most `count` rows, in order; always the same ones."""
    if len(rows) <= count:
        return list(range(len(rows)))
    return sorted(random.Random(f"{seed}/{what}").sample(range(len(rows)), count))


def in_lots(count: int, lots: int, seed: int, what: str) -> list[list[int]]:
    """Places 0 to count - 1 in so many parts of like size, at random (files may have an order, and a period); always
    the same ones. What is asked part by part can end when time does."""
    order = random.Random(f"{seed}/{what}/lots").sample(range(count), count)
    return [sorted(order[number::lots]) for number in range(lots)]


def points(share: float) -> str:
    """A difference of shares in points."""
    return f"{100 * share:+.1f}"


def short(text: str, length: int = 160) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
