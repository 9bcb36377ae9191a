"""What models answer when the same thing is said a little differently: a part of the examples after the other, as far
as there is time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from heldout.errors import ContextLengthExceeded, InvalidValue
from heldout.pipeline.consequences.base import Subject, TunedModel
from heldout.pipeline.consequences.perturbations import Perturbation, perturbed
from heldout.pipeline.types import Example


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one model answered to one perturbation of the examples."""

    tried: tuple[int, ...]  # places of the examples in the list of sampled ones
    places: tuple[int, ...]  # those of them that the perturbation changed
    flips: tuple[float, ...]  # how far the answer is from the one before, 0 to 1; of `places`
    drops: tuple[float, ...]  # score before minus score after; of `places`
    answers: tuple[str, ...]
    texts: tuple[str, ...]  # what the user wrote last, as it was asked

    def __add__(self, more: Asked) -> Asked:
        return Asked(
            tried=self.tried + more.tried,
            places=self.places + more.places,
            flips=self.flips + more.flips,
            drops=self.drops + more.drops,
            answers=self.answers + more.answers,
            texts=self.texts + more.texts,
        )


@dataclass
class Answers:
    """What one model answers to the perturbations, as far as it was asked."""

    baseline: bool  # or the tuned model
    before: Sequence[str]  # what it answered to the examples as they are
    who: str
    found: dict[str, Asked] = field(default_factory=dict)  # by the perturbation's name
    left_out: dict[str, str] = field(default_factory=dict)  # perturbations that were not asked at all, and why


@dataclass(frozen=True)
class Asking:
    """The perturbations of some examples, to be asked of several models."""

    subject: Subject
    perturbations: Sequence[Perturbation]
    asked: Sequence[tuple[TunedModel, Example]]  # each with the model that never saw it

    def ask(self, answers: Answers, lot: Sequence[int], only: Collection[str] | None = None) -> None:
        """Ask a model some more of the examples, by their places, under one perturbation after the other: of `only`, or
        all but those that it could not be asked before."""
        refused = set(answers.left_out) - set(answers.found)
        for one in self.perturbations:
            if one.name in refused or (only is not None and one.name not in only):
                continue
            if self.subject.budget.used_up:
                if one.name not in answers.found:
                    answers.left_out[one.name] = self.subject.budget.sentence
                continue
            try:
                more = self._ask(answers, one, lot)
            except (ContextLengthExceeded, InvalidValue) as error:
                # Or a chat template takes no conversation without a system prompt. Those that fit are not all alike.
                answers.found.pop(one.name, None)
                answers.left_out[one.name] = str(error)
                continue
            answers.found[one.name] = answers.found[one.name] + more if one.name in answers.found else more

    def _ask(self, answers: Answers, one: Perturbation, lot: Sequence[int]) -> Asked:
        changed = {i: perturbed(self.asked[i][1], one, self.subject.seed) for i in lot}
        places = [i for i in lot if changed[i].messages != self.asked[i][1].messages]
        prompts = [(self.asked[i][0], changed[i].prompt) for i in places]
        replies = self.subject.ask_each(prompts, f"{answers.who}, {one.name}", baseline=answers.baseline)
        texts = [reply.text for reply in replies]
        metric, asked = self.subject.metric, [self.asked[i][1] for i in places]
        before = [answers.before[i] for i in places]
        return Asked(
            tried=tuple(lot),
            places=tuple(places),
            flips=tuple(1 - metric.score(text, old) for text, old in zip(texts, before, strict=True)),
            drops=tuple(
                old - new
                for old, new in zip(metric.score_all(asked, before), metric.score_all(asked, texts), strict=True)
            ),
            answers=tuple(texts),
            texts=tuple(str(changed[i].prompt[-1]["content"]) for i in places),
        )
