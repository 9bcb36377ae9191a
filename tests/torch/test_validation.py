"""What a look at valid says of every example, on tiny models of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from heldout.engine.template import Tokens
from heldout.pipeline.watch import Silent
from heldout.train import loop
from heldout.train.method import TEMPERATURES
from tests.torch.cases import tokens_of
from tests.torch.conftest import LLAMA, PLAN, build, examples
from tests.torch.plain import Plain


def test_validation_is_the_mean_loss_of_every_example(families: dict[str, Path]) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, "everything")
    plain, seen = Plain(families[LLAMA], trainee), loop.validate(trainee, rows)
    assert seen.losses == pytest.approx([plain.valid_loss([row]) for row in rows], rel=1e-4)
    assert len(seen.right) == len(rows)


def test_calibrated_losses_are_those_at_the_best_temperature_for_all_examples_together(
    families: dict[str, Path],
) -> None:
    trainee = build(families[LLAMA])
    rows = tokens_of(trainee.template, "everything")
    plain, seen = Plain(families[LLAMA], trainee), loop.validate(trainee, rows)

    def losses(row: Tokens, temperature: float) -> float:
        logits, targets = plain.logits(row)
        supervised = torch.tensor(row.supervised[1:])
        return float(F.cross_entropy(logits.detach()[supervised] / temperature, targets[supervised]))

    wanted = {one: [losses(row, one) for row in rows] for one in TEMPERATURES}
    best = min(wanted, key=lambda one: sum(wanted[one]))
    assert best != 1.0, "an untrained model is not calibrated"
    assert seen.temperature == best
    assert seen.calibrated == pytest.approx(wanted[best], rel=1e-4)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_model_that_is_only_surer_of_the_same_answers_has_the_same_calibrated_loss(
    families: dict[str, Path], tmp_path: Path, factor: float
) -> None:
    trainee = build(families[LLAMA])
    learned = trainee.rows(examples(range(32)), "train")
    loop.run(PLAN, trainee, learned, [], checkpoints=tmp_path, watch=Silent())
    rows = [*learned, *tokens_of(trainee.template, "everything")]
    before = loop.validate(trainee, rows)
    assert TEMPERATURES[2] <= before.temperature <= TEMPERATURES[-3], "twice or half as high is still tried"
    trainee.head.weight.data.mul_(factor)
    after = loop.validate(trainee, rows)
    assert after.losses != pytest.approx(before.losses, rel=1e-2)
    assert after.calibrated == pytest.approx(before.calibrated, rel=1e-4)
    assert (after.temperature, after.right) == (pytest.approx(factor * before.temperature), before.right)


def test_an_answer_counts_as_right_when_greedy_decoding_would_give_it(families: dict[str, Path]) -> None:
    trainee = build(families[LLAMA])
    template = trainee.template
    plain = Plain(families[LLAMA], trainee)
    prompts = [row.ids[:-4] for row in tokens_of(template, "one system prompt")]
    rows, wanted = [], []
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(plain.peft(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if i % 2:
            ids[-2] += 1
        rows.append(Tokens(tuple(ids), (False,) * len(prompt) + (True,) * 3))
        wanted.append(i % 2 == 0)
    assert loop.validate(trainee, rows).right == wanted
