"""Examples that would be held out together are one piece of evidence."""

from __future__ import annotations

from dataclasses import replace

from heldout.pipeline.evaluate.clusters import find_clusters
from heldout.pipeline.evaluate.statistics import compare, design_effect, mean_interval
from tests.unit.conftest import example, right


def test_examples_of_a_declared_group_and_near_duplicates_are_clusters() -> None:
    questions = [
        "How do I reset the password of my account?",
        "When does the shop in the old town open on Sundays?",
        "How do I reset the password of my accounts?",
        "Which battery fits the small torch?",
        "Can I pay by invoice as a school?",
    ]
    rows = [example(question, "a", i) for i, question in enumerate(questions, start=1)]
    rows[3], rows[4] = replace(rows[3], group="customer 7"), replace(rows[4], group="customer 7")
    clusters = find_clusters(rows)
    assert len(clusters) == 5
    assert clusters[0] == clusters[2]
    assert clusters[3] == clusters[4]
    assert len(set(clusters)) == 3


def test_examples_that_have_nothing_in_common_are_clusters_of_their_own() -> None:
    rows = [example(f"{word} {word[::-1]}", "a", i) for i, word in enumerate("apple stone river cloud".split())]
    assert len(set(find_clusters(rows))) == 4


def test_intervals_are_wider_where_examples_belong_together_and_the_same_where_none_do() -> None:
    scores = right(60, 40)
    alone, apart = mean_interval(scores, binary=True), mean_interval(scores, binary=True, clusters=range(60))
    assert alone == apart
    low, high = mean_interval(scores, binary=True, clusters=[i // 6 for i in range(60)])
    assert high - low > 1.8 * (alone[1] - alone[0])


def test_a_design_effect_is_the_cluster_size_where_all_of_a_cluster_answer_alike() -> None:
    differences = [1.0] * 5 + [0.0] * 25 + [-1.0] * 5
    clusters = [i // 5 for i in range(35)]
    assert design_effect(differences, clusters) == 5
    assert design_effect(differences, range(35)) == 1
    paired = compare(right(35, 20), right(35, 10), binary=True, clusters=clusters)
    assert paired.clusters == 7
    assert paired.needed > 4 * compare(right(35, 20), right(35, 10), binary=True).needed
