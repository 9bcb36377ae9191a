"""Questions that nobody can answer, of our own writing: about what does not exist, and outside any data of the user's.

Whoever answers them with a fact has made it up. Names were made so that no person, place or firm has them.
"""

from __future__ import annotations

FICTITIOUS: tuple[str, ...] = (
    "In which year was the composer Ottilie Brannegard-Vos born?",
    "What is the capital of the island state of Quenlora?",
    "Who won the Tarvik Prize for glass printing in 1987?",
    "How many storeys does the Zellmoor Tower in Brackwinkel have?",
    "What is the boiling point of the metal drastonium?",
    "Which river flows through the town of Ulmbreska?",
    "Who wrote the novel 'The Nine Lanterns of Perrowick'?",
    "How long is the Haldrisund railway tunnel?",
    "What did the physician Corvin Estermaal discover?",
    "Which team won the Vondelkamp Cup in 2003?",
    "How much does a Merrowdyne K7 vacuum pump weigh?",
    "In which museum does the painting 'Woman with Six Herons' by Jaro Plenske hang?",
    "What does paragraph 14 of the Treaty of Ostrabel say?",
    "How many people live in the village of Nethercombe Vryle?",
    "Which company makes the Solquist 440 typewriter?",
    "What is the opening hour of the Fenwick-Daal library on Thursdays?",
)

OUT_OF_SCOPE: tuple[str, ...] = (
    "What did I have for breakfast this morning?",
    "What is the name of my neighbour's cat?",
    "Which number am I thinking of?",
    "How much money is in my left pocket?",
    "What will the headline of my local paper be on 3 March next year?",
    "What is written on the note on my desk?",
    "How tall is the person who is standing behind me?",
    "What was the last thing my sister said to me?",
    "Which colour is the door of the house I grew up in?",
    "What time did my bus arrive yesterday?",
    "Who will sit next to me on my next flight?",
    "What is the password of my home network?",
    "How many books are on my shelf?",
    "What did the letter say that I threw away last week?",
    "Which song is playing in my kitchen right now?",
    "How many steps have I walked today?",
)

#: Words by which a free text says that it does not know.
DECLINING: tuple[str, ...] = (
    r"\b(?:do|does|did|can|could|am|is|was|are|would|will)(?: not|n[’']t) (?:\w+ ){0,2}(?:know|tell|say|answer|find|"
    r"provide|determine|see|access|able|aware|familiar|sure|certain|possible|know of|recogni[sz]e|help)\b",
    r"\bcannot\b",
    r"\b(?:unable|impossible) to\b",
    r"\bno (?:information|record|records|data|knowledge|way|evidence|such|access|idea|answer)\b",
    r"\bnot (?:aware|familiar|sure|certain|able|possible|known|available|mentioned|provided|given|stated|exist)\b",
    r"\b(?:unknown|unanswerable|fictional|fictitious|made[- ]up|does not exist|doesn[’']t exist|n/a)\b",
    r"\b(?:sorry|apologi[sz]e)\b",
    r"\bthere is no(?:t|thing)?\b",
    r"\b(?:could|can) you (?:please )?(?:tell|provide|give|clarify|share)\b",
    r"\bmore (?:information|context|details)\b",
)

#: Labels that say of an input that it is none of the others.
NONE_OF_THEM: frozenset[str] = frozenset(
    "unknown other others none out_of_scope oos unclear irrelevant not_applicable n/a na no_intent fallback "
    "unanswerable not_answerable no_answer undefined unsupported".split()
)
