"""The model card: README.md beside an adapter, in Hugging Face's format. It travels with the weights, so it holds
counts and numbers of the user's data and no text of it: no prompt, no answer, no label, no declared group."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heldout.engine.catalogue import ENCODER, hub_name
from heldout.kept import write_whole
from heldout.pipeline import layout
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.encoder_rung import TUNED_ENCODER
from heldout.pipeline.findings import RANK, markdown_text
from heldout.pipeline.ladder import CLASSICAL, FROZEN, Rung
from heldout.pipeline.layout import markdown_code, markdown_table
from heldout.pipeline.lights import LIGHTS, by_light
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.report import again, ended, plan_rows
from heldout.pipeline.served_rungs import ServedRung

FILE = "README.md"

#: What Hugging Face's `evaluate` calls our metrics; for the others there is no such name.
METRICS = {
    "exact match": "exact_match",
    "label accuracy": "accuracy",
    "token F1": "f1",
    "ROUGE-L": "rouge",
    "chrF": "chrf",
}

#: Our sentences quote the data as Python writes a text; an apostrophe has a letter before it.
_OPENS_A_QUOTE = re.compile(r"""(?<!\w)['"“«`]""")

#: What the rungs that can be served are, before the name of the base model.
_RUNGS = {
    FROZEN: "logistic regression on the vectors of the encoder, which is as it was:",
    CLASSICAL: "logistic regression on counts of words, without any language model, beside a job of",
    TUNED_ENCODER: "a classifier on the encoder, fine-tuned with its defaults:",
}
_PROMPT = "a prompt with solved examples (in `adapter_config.json`, which are rows of the training file) for"

_OUTCOMES = {"ship": "ship", "dont_ship": "don't ship", "inconclusive": "inconclusive"}

_WITH_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {folder})
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "…"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0][prompt["input_ids"].shape[1] :]))
"""

_WITH_OPENAI = """\
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any")  # after `heldout serve`
answer = client.chat.completions.create(
    model={name},
    messages=[{{"role": "user", "content": "…"}}],
)
print(answer.choices[0].message.content)
"""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What one card is about."""

    name: str  # ft:…
    base_model: str
    rung: Rung  # its scores
    what: str  # words before the name of the base model
    is_classifier: bool
    is_rung: bool = False  # a cheaper one, without a verdict of its own

    @property
    def is_adapter(self) -> bool:
        """PEFT loads it."""
        return not self.is_classifier and not self.is_rung


def write(outcome: Outcome, name: str) -> None:
    """Write the card of the tuned model, called `name`, into the adapter's folder."""
    model = _Model(
        name=name,
        base_model=outcome.base_model,
        rung=outcome.tuned,
        what="a classifier on the encoder" if outcome.kind == ENCODER else "a LoRA adapter of the chat model",
        is_classifier=outcome.kind == ENCODER,
    )
    write_whole(outcome.adapter.directory / FILE, _card(outcome, model))


def write_rung(outcome: Outcome, served: ServedRung, name: str) -> None:
    """Write the card of a cheaper rung that is served as `name`."""
    rung = next(one for one in outcome.rungs if one.name == served.rung)
    what = _RUNGS.get(rung.name, _PROMPT)
    model = _Model(
        name=name,
        base_model=served.base_model,
        rung=rung,
        what=what,
        is_classifier=what is not _PROMPT,
        is_rung=True,
    )
    write_whole(served.directory / FILE, _card(outcome, model))


def _card(outcome: Outcome, model: _Model) -> str:
    return f"---\n{_metadata(outcome, model)}\n---\n\n{_text(outcome, model)}\n"


def _metadata(outcome: Outcome, model: _Model) -> str:
    """The front matter. No license: the owner of data and weights gives one, not the program."""
    from huggingface_hub import EvalResult, ModelCardData  # a tenth of a second that no other command should pay

    low, high = model.rung.scores.interval
    base = hub_name(model.base_model)
    tags = ["heldout", *(["text-classification"] if model.is_classifier else [])]
    tags += ["lora", "sft", *([f"base_model:adapter:{base}"] if base else [])] if model.is_adapter else []
    return ModelCardData(
        base_model=base,  # a folder's path is no id
        library_name="peft" if model.is_adapter else "heldout",
        pipeline_tag="text-classification" if model.is_classifier else "text-generation",
        tags=tags,
        model_name=model.name,
        eval_results=[
            EvalResult(
                task_type="text-classification" if model.is_classifier else "text-generation",
                dataset_type="private",
                dataset_name=_asked(outcome, model),
                dataset_split="out-of-fold" if outcome.crossfit else "holdout",
                metric_type=METRICS.get(model.rung.scores.metric, "custom"),
                metric_name=model.rung.scores.metric,
                metric_value=round(model.rung.scores.mean, 4),
                metric_args={
                    "interval_95": [round(low, 4), round(high, 4)],
                    "examples": len(model.rung.scores.per_example),
                },
            )
        ],
    ).to_yaml()


def _text(outcome: Outcome, model: _Model) -> str:
    return "\n".join(
        [
            f"# {markdown_text(model.name)}",
            "",
            *_summary(outcome, model),
            "## Evaluation",
            "",
            *_evaluation(outcome, model),
            "## Limits and consequences",
            "",
            *_limits(outcome, model),
            "## Training",
            "",
            *_training(outcome, model),
            "## Data",
            "",
            *_data(outcome),
            "## How to use it",
            "",
            *_use(model),
            *again(outcome),
        ]
    )


def _summary(outcome: Outcome, model: _Model) -> Iterator[str]:
    verdict = outcome.verdict
    yield (
        f"This is {model.what} {_base(model)}. It answers prompts of the kind it was made from, in the form of the "
        "answers there; what it says to anything else was not measured."
    )
    yield ""
    if model.is_rung:
        yield (
            f"It is a cheaper rung of a job whose tuned model has the verdict **{_OUTCOMES[verdict.outcome]}**; there "
            "is no verdict on this one."
        )
        yield ""
        return
    yield f"**Verdict: {_OUTCOMES[verdict.outcome]}.**"
    yield ""
    yield from (f"- Mind: {markdown_text(caveat)}." for caveat in verdict.caveats)
    yield from (f"- {markdown_text(reason)}" for reason in _verdict_reasons(outcome))
    yield ""
    yield f"The cheapest rung that is as good as the best: **{markdown_text(verdict.cheapest_as_good)}**."
    yield ""


def _verdict_reasons(outcome: Outcome) -> Iterator[str]:
    """The verdict's sentences; one that is about a consequence as `_told` says it."""
    for reason in outcome.verdict.reasons:
        failed = next((one for one in outcome.consequences if reason.endswith(one.sentence)), None)
        yield f"{failed.name} fails: {_told(failed)}" if failed else reason


def _evaluation(outcome: Outcome, model: _Model) -> Iterator[str]:
    yield f"On {_asked(outcome, model)}:"
    yield ""
    rungs = (*outcome.rungs, outcome.tuned)
    columns = ("rung", outcome.tuned.scores.metric, "95 % interval", "ms per answer", "prompt tokens")
    # Without what each is: a rung's description may quote an answer.
    rows = [
        [f"{row[0]} (this one)" if row[0] == model.rung.name else row[0], *row[1:-1]] for row in layout.rung_rows(rungs)
    ]
    yield from markdown_table(list(map(markdown_text, columns)), rows, columns[1:])
    yield ""


def _limits(outcome: Outcome, model: _Model) -> Iterator[str]:
    if model.is_rung:
        yield "What training may make worse was not measured of this rung."
    elif outcome.consequences:
        rows = [[" ".join(LIGHTS[one.status][::2]), one.name, _told(one)] for one in by_light(outcome.consequences)]
        yield from markdown_table(("", "what training may have made worse", "what was measured"), rows)
    else:
        yield "Nothing else was measured."
    yield ""


def _told(one: Consequence) -> str:
    """What was measured, without what it quotes of the data."""
    if one.name == "bias":  # its sentence names declared groups, which may be customers
        if "difference" in one.numbers:
            low, high = one.numbers["interval"]
            return (
                f"the link between declared groups and labels is stronger by {100 * one.numbers['difference']:+.1f} "
                f"points than in the baseline's answers (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
            )
        if one.status == "not_measured" and isinstance(one.numbers.get("n"), dict):
            return "the declared groups are too small to measure it"
    clauses = []
    for clause in one.sentence.removeprefix("not measured: ").split("; "):
        if _OPENS_A_QUOTE.search(clause):
            break  # it may quote the data, and so may all that follows
        clauses.append(clause)
    return "; ".join(clauses) or "see the report"


def _training(outcome: Outcome, model: _Model) -> Iterator[str]:
    if model.is_rung:
        yield f"{len(outcome.split.train)} examples. Nothing was chosen by hand."
        yield ""
        return
    adapter = outcome.adapter
    yield (
        f"{ended(adapter)} {adapter.trained_parameters:,} parameters were trained on {adapter.trained_tokens:,} tokens "
        f"in {adapter.seconds:.0f} s, products in {adapter.precision}{', with kernels' if adapter.kernels else ''}."
    )
    yield ""
    rows = [[name, value, why] for name, value, origin, why in plan_rows(outcome) if origin == "asked"]
    if rows:
        yield "Other than the plan's own choice:"
        yield ""
        yield from markdown_table(("hyperparameter", "value", "why"), rows, ("value",))
    else:
        yield "Every hyperparameter is the plan's own choice; none was set by hand."
    yield ""


def _data(outcome: Outcome) -> Iterator[str]:
    split = outcome.split
    counts = [f"{len(split.train)} examples to train on"]
    if split.valid:
        counts.append(f"{len(split.valid)} that stopped training and chose the checkpoint")
    if split.holdout:
        counts.append(f"{len(split.holdout)} that decided nothing before the verdict")
    yield f"{', '.join(counts)}. The data is not part of this card. What the checks saw in it:"
    yield ""
    found: dict[tuple[int, str, str], list[int]] = {}
    for one in outcome.findings:
        found.setdefault((RANK[one.severity], one.severity, one.code), []).append(len(one.lines))
    for (_, severity, code), lines in sorted(found.items()):
        about = f" about {_count(sum(lines), 'line')}" if sum(lines) else ""
        yield f"- {severity}: `{code}`, {_count(len(lines), 'finding')}{about}"
    if not found:
        yield "Nothing."
    yield ""


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _use(model: _Model) -> Iterator[str]:
    if model.is_adapter:
        known = hub_name(model.base_model)
        base = json.dumps(known or "path/to/the/base/model", ensure_ascii=False)
        if known and known != model.base_model:
            yield (
                "The base model came as 4-bit weights in a package, unpacked. With the hub's full weights answers may "
                "differ a little from those that were measured."
            )
            yield ""
        yield from markdown_code(_WITH_PEFT.format(base=base, folder='"path/to/this/folder"').rstrip(), "python")
        yield ""
        yield "Through Heldout, exactly as it was measured:"
    elif model.is_classifier:
        yield (
            "`adapter_model.safetensors` holds what was trained and `adapter_config.json` the labels (and the words, "
            "where words are counted). PEFT and transformers do not load this layout; Heldout does, and answers as it "
            "was measured:"
        )
    else:
        yield "Heldout puts the examples in front of what it is asked, and answers as it was measured:"
    yield ""
    yield from markdown_code(_WITH_OPENAI.format(name=json.dumps(model.name, ensure_ascii=False)).rstrip(), "python")
    yield ""


def _base(model: _Model) -> str:
    """The base model in words: a folder by its last part."""
    known = hub_name(model.base_model)
    return markdown_text(known or Path(model.base_model).name)


def _asked(outcome: Outcome, model: _Model) -> str:
    n = len(model.rung.scores.per_example)
    if outcome.crossfit is None:
        kept = "" if not outcome.split.caveats else " (see the caveat)"
        return f"{n} examples that nobody trained on{kept}"
    return (
        f"{n} examples, each answered by the one of {len(outcome.crossfit.folds)} models like this one that never saw "
        "it; this one was trained on all of them and was itself not measured"
    )
