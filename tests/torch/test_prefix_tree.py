"""Packs are prefix trees: every token once per path, seen by exactly the examples below it."""

from __future__ import annotations

import random

import pytest
import torch

from heldout.engine.template import Tokens
from heldout.train.attention import attend, attend_anew, attend_backward
from heldout.train.layout import Layout
from heldout.train.packing import WORTH_SHARING, micro_batches, pack, prefix_tree

SYSTEM, SHOTS_A, SHOTS_B = list(range(100, 120)), list(range(200, 230)), list(range(300, 312))


def sequences(seed: int) -> list[list[int]]:
    """Sequences that share prefixes of all lengths: continued, cut, copied and new ones of three tokens."""
    rng = random.Random(seed)
    found: list[list[int]] = []
    for _ in range(rng.randint(1, 12)):
        start = list(rng.choice(found))[: rng.randint(0, 40)] if found and rng.random() < 0.8 else []
        more = 0 if start and rng.random() < 0.3 else rng.randint(1, 25)
        found.append([*start, *(rng.randint(0, 2) for _ in range(more))])
    rng.shuffle(found)
    return found


def rows_of(seed: int) -> list[Tokens]:
    """Examples whose bodies are `sequences`."""
    return [Tokens((*body, 5), (False,) * len(body) + (True,)) for body in sequences(seed)]


def spell(bodies: list[list[int]], share: bool) -> list[list[int]]:
    """What each example reads along its path through the pack."""
    one = pack([Tokens((*body, 0), (False,) * len(body) + (True,)) for body in bodies], share=share)
    return [[int(one.ids[i]) for start, end in spans for i in range(start, end)] for spans in one.spans]


@pytest.mark.parametrize("share", [True, False])
def test_every_example_reads_its_own_tokens_along_its_path(share: bool) -> None:
    for seed in range(200):
        bodies = sequences(seed)
        assert spell(bodies, share) == bodies


def test_positions_count_along_the_path() -> None:
    for seed in range(200):
        one = pack(rows_of(seed))
        positions = one.layout.position_ids[0].tolist()
        for spans in one.spans:
            path = [positions[i] for start, end in spans for i in range(start, end)]
            assert path == list(range(len(path)))


def test_parts_that_are_shared_on_several_levels_are_written_once() -> None:
    bodies = [
        [*SYSTEM, *SHOTS_A, 1, 2, 3],
        [*SYSTEM, *SHOTS_B, 4, 5],
        [*SYSTEM, *SHOTS_A, 6],
        [*SYSTEM, *SHOTS_B, 7, 8, 9],
        [10, 11, 12],
    ]
    segments, chains = prefix_tree(bodies)
    assert segments[-1].end == len(SYSTEM) + len(SHOTS_A) + len(SHOTS_B) + 3 + 2 + 1 + 3 + 3
    assert [len(chain) for chain in chains] == [3, 3, 3, 3, 1]
    assert chains[0][:2] == chains[2][:2]
    assert chains[1][:2] == chains[3][:2]
    assert chains[0][0] == chains[1][0]
    assert [one.own for one in segments].count(False) == 3


def test_a_pack_is_never_longer_than_its_examples_and_no_token_is_lost() -> None:
    for seed in range(200):
        bodies = sequences(seed)
        segments, chains = prefix_tree(bodies)
        assert segments[-1].end <= sum(map(len, bodies))
        assert {i for chain in chains for i in chain} == set(range(len(segments)))
        assert all(segments[chain[-1]].own and len(segments[chain[-1]]) >= 1 for chain in chains)
        # What examples that share nothing worth while cost is exactly their tokens.
        heads = [[100 * i, *body] for i, body in enumerate(bodies)]
        assert prefix_tree(heads)[0][-1].end == sum(map(len, heads))


def test_what_is_not_worth_sharing_costs_little() -> None:
    for seed in range(200):
        bodies = sequences(seed)
        # A trie shares every single token, but the last of an example stays its own.
        trie = {tuple(body[:n]) for body in bodies for n in range(1, len(body))}
        lost = prefix_tree(bodies)[0][-1].end - (len(trie) + len(bodies))
        assert 0 <= lost <= WORTH_SHARING * len(bodies)


def test_every_weighted_token_is_predicted_once_for_each_example_that_learns_it() -> None:
    rng = random.Random(0)
    for seed in range(50):
        rows = [
            Tokens((*body, 5), tuple(rng.random() < 0.5 for _ in body) + (True,))  # noqa: RUF005
            for body in sequences(seed)
        ]
        for prompt_weight in (0.0, 0.25):
            one = pack(rows, prompt_weight=prompt_weight)
            found: list[list[tuple[int, int, float]]] = [[] for _ in rows]
            for entry, owner, weight in zip(one.entries, one.owners, one.weights, strict=True):
                at = one.rows[one.sources[entry]]
                found[owner].append((int(one.layout.position_ids[0, at]) + 1, int(one.targets[entry]), float(weight)))
            assert found == [
                [
                    (i, row.ids[i], 1.0 if row.supervised[i] else prompt_weight)
                    for i in range(1, len(row))
                    if row.supervised[i] or prompt_weight
                ]
                for row in rows
            ]
            assert one.rows.tolist() == sorted(set(one.rows.tolist()))


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: object) -> torch.Tensor:
    """Every example by itself, causal."""
    out = torch.full_like(q, torch.nan)
    group = q.shape[1] // k.shape[1]
    for stretches in spans:  # type: ignore[attr-defined]
        path = torch.cat([torch.arange(start, end) for start, end in stretches])
        keys, values = (x[path].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[path], keys) * 0.3
        future = torch.ones(len(path), len(path), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        out[path] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_attention_over_a_tree_is_that_of_every_example_alone(heads: int, kv_heads: int) -> None:
    for seed in range(40):
        one = pack(rows_of(seed))
        torch.manual_seed(seed)
        length, width = len(one.ids), 4
        q = torch.randn(length, heads, width, requires_grad=True)
        k, v = (torch.randn(length, kv_heads, width, requires_grad=True) for _ in range(2))
        outer = torch.randn(length, heads, width)
        wanted = plain_attention(q, k, v, one.spans)
        gradients = torch.autograd.grad(wanted, (q, k, v), outer)
        out, kept = attend(q.detach(), k.detach(), v.detach(), one.layout, 0.3)
        torch.testing.assert_close(out, wanted.detach(), rtol=1e-4, atol=1e-5)
        found = attend_backward(outer, kept, one.layout, 0.3).split([heads, kv_heads, kv_heads], dim=1)
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        anew = attend_anew(q, k, v, one.layout, 0.3)
        torch.testing.assert_close(anew, wanted, rtol=1e-4, atol=1e-5)
        # The bias by which a GPU computes all at once.
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)[None] for x in (k, v))
        at_once = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=one.layout.bias(torch.float32), scale=0.3
        )
        torch.testing.assert_close(at_once[0].transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)


def test_memory_that_nothing_was_written_to_does_not_leak_into_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(x: torch.Tensor, *shape: int, **_: object) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: torch.full(tuple(shape), torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full(x.shape, torch.nan))
    for seed in range(40):
        one = pack(rows_of(seed))
        q = torch.randn(len(one.ids), 2, 4)
        out, kept = attend(q, q, q, one.layout, 0.3)
        assert out.isfinite().all()
        assert attend_backward(q, kept, one.layout, 0.3).isfinite().all()


def test_a_layout_counts_its_scores() -> None:
    (row,) = [Tokens((*range(10), 5), (False,) * 10 + (True,))]
    assert pack([row]).layout.scores() == 100
    assert Layout.of(prefix_tree([[*SYSTEM, 1], [*SYSTEM, 2]])[0]).scores() == 20 * 20 + 2 * 21


@pytest.mark.parametrize("limit", [1, 30, 60, 10_000])
def test_micro_batches_hold_every_row_once_and_keep_the_limit(limit: int) -> None:
    for seed in range(300):
        rows = rows_of(seed)
        packs = micro_batches(rows, range(len(rows)), limit=limit)
        assert sorted(row for one in packs for row in one) == list(range(len(rows)))
        for one in packs:
            assert len(one) == 1 or len(pack([rows[i] for i in one]).ids) <= limit
    assert micro_batches(rows, [], limit=limit) == []


def test_micro_batches_keep_together_what_shares() -> None:
    bodies = [[*(SHOTS_A if i % 2 else SHOTS_B), *SYSTEM, i] for i in range(8)]
    rows = [Tokens((*body, 5), (False,) * len(body) + (True,)) for body in bodies]
    packs = micro_batches(rows, range(8), limit=90)
    assert sorted(map(sorted, packs)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
