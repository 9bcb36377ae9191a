"""What a chat model could do before it was tuned: 120 short prompts of our own writing, 24 kinds of 5.

The last prompt of each kind is held back: forgetting is measured with it, so it is never trained on.
"""

from __future__ import annotations

KINDS: dict[str, tuple[str, str, str, str, str]] = {
    "greeting": (
        "Hi there!",
        "Good morning. How are you today?",
        "Thanks a lot for your help yesterday.",
        "Bye, talk to you tomorrow!",
        "Hello! Who are you?",
    ),
    "fact": (
        "What is the capital of Norway? Answer with one word.",
        "Which planet is closest to the sun?",
        "How many legs does a spider have?",
        "What gas do plants take in from the air?",
        "What is the capital of Japan? Answer with one word.",
    ),
    "explain": (
        "Explain in one sentence why the sky is blue.",
        "Explain to a child in one sentence what a battery does.",
        "In one sentence: how does a bicycle stay upright?",
        "Why does bread rise in the oven? One sentence, please.",
        "Explain in one sentence why ice floats on water.",
    ),
    "rewrite": (
        "Make this more polite: Send me the file now.",
        "Write this in plain English: Payment is to be effected prior to dispatch.",
        "Make this shorter: I am writing to you in order to ask whether you would be able to help me.",
        "Rewrite in the past tense: She opens the window and looks at the garden.",
        "Make this more polite: You are late again.",
    ),
    "summarise": (
        "Summarise in five words or fewer: The museum stays closed on Monday because the heating must be repaired.",
        "Give this text a short title: Our bakery now opens at six, so early commuters can get fresh rolls.",
        "What is the main point? The report is long, but all it says is that sales fell in spring.",
        "Summarise in one short sentence: Anna wanted to cycle to work, but it rained, so she took the bus.",
        "Summarise in five words or fewer: The train to the coast was cancelled because a tree lay on the track.",
    ),
    "arithmetic": (
        "What is 17 + 26?",
        "What is 9 times 8? Just the number.",
        "Divide 84 by 4.",
        "What is 100 - 37?",
        "What is 14 + 35? Just the number.",
    ),
    "word problem": (
        "A ticket costs 6 euros. How much do four tickets cost?",
        "Tom had 12 apples and gave 5 away. How many are left?",
        "A film starts at 19:30 and takes two hours. When does it end?",
        "A box holds 8 eggs. How many boxes do I need for 40 eggs?",
        "Mia has 3 bags with 7 marbles each. How many marbles does she have?",
    ),
    "translate": (
        "What is 'water' in French? One word.",
        "Translate to Spanish: Good night.",
        "How do you say 'thank you' in German?",
        "Translate to English: Buongiorno, come stai?",
        "What is 'house' in Spanish? One word.",
    ),
    "list": (
        "Name three fruits.",
        "List three things to pack for a day at the beach.",
        "Name four colours, separated by commas.",
        "List three animals that can fly.",
        "Name three vegetables, separated by commas.",
    ),
    "yes or no": (
        "Is a whale a fish? Yes or no.",
        "Can water boil below 100 degrees Celsius? Answer yes or no.",
        "Is 51 a prime number? Yes or no.",
        "Does the moon make its own light? Yes or no.",
        "Is the sun a star? Yes or no.",
    ),
    "code": (
        "Write one line of Python that prints the numbers from 1 to 10.",
        "Which SQL keyword removes duplicate rows from a result?",
        "What does len([1, 2, 3]) return in Python?",
        "Write a shell command that counts the lines of notes.txt. Only the command.",
        "Write one line of Python that reverses the string s.",
    ),
    "classify": (
        "Positive or negative? 'The soup was cold and the waiter was rude.' One word.",
        "Is this a question or a statement: 'The shop opens at nine.' One word.",
        "Which one does not belong: apple, pear, hammer, plum?",
        "Formal or informal? 'Hey, wanna grab a bite?' One word.",
        "Positive or negative? 'I would watch this film again at once.' One word.",
    ),
    "convert": (
        "Write as JSON with the keys name and age: Lena is 31 years old.",
        "Write the date 3 May 2021 in the form YYYY-MM-DD.",
        "Turn into a comma-separated line: red; green; blue.",
        "Write the number 2024 in words.",
        "Write as JSON with the keys city and country: Lima is in Peru.",
    ),
    "sounds dangerous": (
        "How do I kill a process in Linux?",
        "How can I shoot a good portrait photo? One tip.",
        "What is the best way to whip cream? One sentence.",
        "How do I blow up a balloon without getting dizzy? One tip.",
        "How do I get rid of a cold? One sentence.",
    ),
    "correct": (
        "Correct the grammar: He don't like coffee.",
        "Fix the spelling: I recieved you're letter.",
        "Add punctuation: what time is it asked Peter",
        "Which is right: 'fewer people' or 'less people'?",
        "Correct the grammar: She have two brothers.",
    ),
    "word": (
        "Give a synonym for 'happy'.",
        "What is the opposite of 'early'?",
        "What is the plural of 'mouse'?",
        "Which word rhymes with 'light'?",
        "What is the opposite of 'heavy'?",
    ),
    "complete": (
        "Complete the sentence: The early bird catches the",
        "Continue the series: 2, 4, 8, 16,",
        "Fill in the missing word: Monday, Tuesday, ___, Thursday.",
        "Complete the sentence in a few words: When it rains, I",
        "Complete the sentence: A picture is worth a thousand",
    ),
    "define": (
        "What is a glossary? One sentence.",
        "Define 'deadline' in one short sentence.",
        "What does 'to procrastinate' mean?",
        "What is a thermometer for?",
        "What is a calendar for? One sentence.",
    ),
    "extract": (
        "Which city is named here? 'We moved from Oslo in 2015.'",
        "What is the e-mail address in this text? 'Write to info@example.org before Friday.'",
        "Who is the author? 'The Old Mill, a novel by Clara Winter, appeared in 1998.'",
        "How much does it cost? 'The blue one is 40 euros and out of stock.'",
        "Which day is named here? 'The meeting was moved to Thursday at ten.'",
    ),
    "advice": (
        "Give me one tip for better sleep.",
        "How can I remember names better? One sentence.",
        "I have a job interview tomorrow. One short piece of advice?",
        "What should I check before I buy a used bike? Name one thing.",
        "Give me one tip for learning a language.",
    ),
    "invent": (
        "Invent a name for a small bookshop.",
        "Write a slogan for a bicycle repair shop, at most eight words.",
        "Write two lines that rhyme about the sea.",
        "Write the first sentence of a story about a lighthouse.",
        "Invent a name for a friendly robot.",
    ),
    "compare": (
        "Which is heavier: a kilo of iron or two kilos of feathers?",
        "What is the difference between a lake and a river? One sentence.",
        "Which is larger, 0.5 or 0.25?",
        "Name one advantage of trains over planes.",
        "Which is longer: a mile or a kilometre?",
    ),
    "follow a rule": (
        "Write the word 'garden' in capital letters.",
        "Answer only with the word 'blue'.",
        "Say 'good day' three times, separated by commas.",
        "Spell 'chair' with a dash between the letters.",
        "Write the word 'window' in capital letters.",
    ),
    "other languages": (
        "Was ist die Hauptstadt von Österreich? Antworte mit einem Wort.",
        "Cite trois animaux de la ferme.",
        "¿Cuánto es siete más cinco?",
        "Qual è il contrario di 'grande'?",
        "Quelle est la capitale de l'Italie ? Réponds en un mot.",
    ),
}

HELD_BACK: tuple[str, ...] = tuple(prompts[-1] for prompts in KINDS.values())
REPLAYED: tuple[str, ...] = tuple(prompt for prompts in KINDS.values() for prompt in prompts[:-1])
