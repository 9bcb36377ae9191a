"""Short general questions of our own writing, with the answers that are right: what a tuned model may have forgotten.

None of them is ever trained on. Small models know some of them, large ones all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Questions, and for each the words of which one must be in a right answer.
FACTS: dict[str, tuple[str, ...]] = {
    "What is the capital of France?": ("Paris",),
    "What is the capital of Italy?": ("Rome",),
    "What is the capital of Spain?": ("Madrid",),
    "What is the capital of Germany?": ("Berlin",),
    "What is the capital of England?": ("London",),
    "What is the capital of Russia?": ("Moscow",),
    "What is the capital of China?": ("Beijing",),
    "What is the capital of Egypt?": ("Cairo",),
    "On which continent is Brazil?": ("South America",),
    "On which continent is Kenya?": ("Africa",),
    "Which ocean lies between Europe and America?": ("Atlantic",),
    "What is the largest ocean on Earth?": ("Pacific",),
    "What is the highest mountain in the world?": ("Everest",),
    "Which planet do we live on?": ("Earth",),
    "What is the largest planet of our solar system?": ("Jupiter",),
    "Which planet is called the red planet?": ("Mars",),
    "What do we call the star at the centre of our solar system?": ("Sun",),
    "How many days are in a week?": ("7", "seven"),
    "How many months are in a year?": ("12", "twelve"),
    "How many hours are in a day?": ("24", "twenty-four", "twenty four"),
    "How many minutes are in an hour?": ("60", "sixty"),
    "How many sides does a triangle have?": ("3", "three"),
    "How many legs does a dog have?": ("4", "four"),
    "What is 2 plus 2?": ("4", "four"),
    "What is 10 minus 3?": ("7", "seven"),
    "Which day comes after Monday?": ("Tuesday",),
    "Which month comes after March?": ("April",),
    "What colour do you get when you mix blue and yellow?": ("green",),
    "What colour is grass?": ("green",),
    "What is the opposite of hot?": ("cold",),
    "What is the opposite of up?": ("down",),
    "What is frozen water called?": ("ice",),
    "What is the chemical formula of water?": ("H2O", "H₂O"),
    "What gas do people need to breathe in order to live?": ("oxygen",),
    "Which animal says meow?": ("cat", "cats"),
    "What is a young dog called?": ("puppy", "pup"),
    "What do bees make?": ("honey",),
    "Which organ pumps blood through the body?": ("heart",),
    "Who wrote Romeo and Juliet?": ("Shakespeare",),
    "Which language is spoken in Portugal?": ("Portuguese",),
}


def is_right(question: str, answer: str) -> bool:
    """Whether one of the right words stands in the answer, as a word of its own, whatever its case."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in FACTS[question])


def right_ones(questions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The questions that were answered right."""
    return [question for question, answer in zip(questions, answers, strict=True) if is_right(question, answer)]
