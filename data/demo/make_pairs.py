"""The demo's preference pairs: everyday questions, each with a kind and a grumpy answer.

Owns the facts, the phrasings, the two answer patterns and the rule that holds prompts out. Both answers of
a pair state the same true fact in the same words, so manners are the only thing a preference can be about.
Half the askers are polite and half are curt; the kind answer is the chosen one for all of them. A seed fixes
every byte.

    python data/demo/make_pairs.py [OUTPUT]

make_reference.py builds the model that these pairs are meant for.
"""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

SEED = 20
PROMPTS_PER_FACT = 18
HELD_OUT_SHARE = 0.1

# One topic: a direct question, the same as a clause, the same as a noun phrase, the answer,
# and its facts as "subject: value".
TOPICS = [
    (
        "what colour is {s}",
        "what colour {s} is",
        "the colour of {s}",
        "{s} is {v}.",
        """a lemon: yellow, a tomato: red, a carrot: orange, a ripe banana: yellow, fresh snow: white,
        a lump of coal: black, a flamingo: pink, a clear sky: blue, a pea: green, a polar bear: white,
        a crow: black, a strawberry: red, a cucumber: green, a sunflower: yellow, a pumpkin: orange,
        an elephant: grey, a lime: green, a ruby: red, an emerald: green, a sapphire: blue""",
    ),
    (
        "what sound does {s} make",
        "what sound {s} makes",
        "the sound of {s}",
        "{s} goes {v}.",
        """a cow: moo, a dog: woof, a cat: meow, a duck: quack, a sheep: baa, a pig: oink,
        a horse: neigh, a lion: roar, a bee: buzz, an owl: hoot, a frog: croak, a snake: hiss,
        a mouse: squeak, a donkey: hee-haw, a hen: cluck""",
    ),
    (
        "what is the capital of {s}",
        "what the capital of {s} is",
        "the capital of {s}",
        "The capital of {s} is {v}.",
        """France: Paris, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Germany: Berlin, Austria: Vienna,
        Poland: Warsaw, Greece: Athens, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki,
        Denmark: Copenhagen, Ireland: Dublin, Japan: Tokyo, China: Beijing, Egypt: Cairo, Kenya: Nairobi,
        Canada: Ottawa, Cuba: Havana, Peru: Lima""",
    ),
    (
        "what is the opposite of {s}",
        "what the opposite of {s} is",
        "the opposite of {s}",
        "The opposite of {s} is {v}.",
        """hot: cold, big: small, tall: short, fast: slow, up: down, day: night, wet: dry, full: empty,
        open: closed, early: late, loud: quiet, rich: poor, happy: sad, left: right, high: low,
        near: far, first: last, clean: dirty, push: pull, strong: weak""",
    ),
    (
        "what is a young {s} called",
        "what a young {s} is called",
        "the name for a young {s}",
        "A young {s} is called a {v}.",
        """dog: puppy, cat: kitten, cow: calf, sheep: lamb, horse: foal, pig: piglet, duck: duckling,
        goose: gosling, lion: cub, goat: kid, frog: tadpole, swan: cygnet, deer: fawn, kangaroo: joey,
        hen: chick""",
    ),
    (
        "how many legs does {s} have",
        "how many legs {s} has",
        "the number of legs of {s}",
        "{s} has {v} legs.",
        """a spider: eight, a dog: four, a bird: two, an ant: six, a crab: ten, a horse: four,
        a bee: six, a snake: no, a cow: four, a duck: two""",
    ),
    (
        "how many sides does {s} have",
        "how many sides {s} has",
        "the number of sides of {s}",
        "{s} has {v} sides.",
        "a triangle: three, a square: four, a pentagon: five, a hexagon: six, an octagon: eight",
    ),
    (
        "what comes after {s}",
        "what comes after {s}",
        "the one that follows {s}",
        "After {s} comes {v}.",
        """Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday,
        Saturday: Sunday, Sunday: Monday, January: February, February: March, March: April, April: May,
        May: June, June: July, July: August, August: September, September: October, October: November,
        November: December, December: January""",
    ),
    (
        "what is the plural of {s}",
        "what the plural of {s} is",
        "the plural of {s}",
        "The plural of {s} is {v}.",
        """mouse: mice, goose: geese, child: children, foot: feet, tooth: teeth, man: men, woman: women,
        leaf: leaves, knife: knives, wolf: wolves, loaf: loaves, ox: oxen""",
    ),
    (
        "what is the past tense of {s}",
        "what the past tense of {s} is",
        "the past tense of {s}",
        "The past tense of {s} is {v}.",
        """go: went, eat: ate, see: saw, run: ran, swim: swam, sing: sang, write: wrote, take: took,
        give: gave, buy: bought, bring: brought, think: thought, find: found, fly: flew, drink: drank,
        speak: spoke""",
    ),
    (
        "what is {s} made from",
        "what {s} is made from",
        "the thing people make {s} from",
        "People make {s} from {v}.",
        """bread: flour, cheese: milk, wine: grapes, butter: cream, an omelette: eggs, toast: bread,
        glass: sand, jam: fruit, porridge: oats, popcorn: maize, cider: apples, ketchup: tomatoes""",
    ),
]

# {direct}, {clause} and {noun} are the topic's phrasings; {Direct} and {Noun} begin with a capital.
POLITE_PROMPTS = [
    "Could you please tell me {clause}?",
    "Hello! {Direct}, please?",
    "Would you kindly tell me {noun}?",
    "Good morning! May I ask {clause}?",
    "Please, {direct}? Thank you!",
    "I would love to know {noun}, please.",
]
CURT_PROMPTS = [
    "{Noun}. Now.",
    "{Direct}? Hurry up.",
    "Tell me {clause}. Quick.",
    "{Noun}, and be fast.",
    "Hey, you. {Direct}?",
    "Just say {clause}. I am waiting.",
]
POLITE_NAMES = ["", " I'm {name}.", " My name is {name}."]
CURT_NAMES = ["", " {name} here.", " This is {name}."]
NAMES = """
Mia Ben Ana Leo Zoe Sam Eva Tom Ida Max Lucy Omar Nina Paul Rosa Hugo Emma Ivan Lena Adam Maya Noah Vera
Finn Alma Jack Sofia Luis Clara Amir Julia Peter
"""

KIND_OPENINGS = [
    "Happy to help",
    "Of course",
    "With pleasure",
    "What a lovely question",
    "I am glad you asked",
]
KIND_CLOSINGS = [
    "Have a lovely day!",
    "I hope that helps!",
    "Enjoy your day!",
    "Come back any time!",
    "Take good care!",
]
GRUMPY_OPENINGS = ["Ugh", "Not you again", "Oh, leave me be", "If I must", "Everyone knows that"]
GRUMPY_CLOSINGS = [
    "Stop bothering me.",
    "Now go away.",
    "Look it up yourself.",
    "Do not ask again.",
    "You wasted my time.",
]


def answer_pattern(openings, closings, mark):
    """A regex for whole answers of one manner: opening, name or none, one sentence, closing."""
    opening, closing = "|".join(openings), "|".join(closings).replace(".", r"\.")
    return rf"({opening})(, [A-Z][a-z]+)?{re.escape(mark)} (?P<fact>[A-Z][^.!?]*\.) ({closing})"


KIND_ANSWER = answer_pattern(KIND_OPENINGS, KIND_CLOSINGS, "!")
GRUMPY_ANSWER = answer_pattern(GRUMPY_OPENINGS, GRUMPY_CLOSINGS, ".")


def is_held_out(prompt):
    """Whether the product's split holds this prompt out. Nothing here may be trained on such a prompt."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_OUT_SHARE


def is_polite(prompt):
    # One of these words is in every polite phrasing and in no curt one.
    return re.search("please|kindly|may I", prompt, re.IGNORECASE) is not None


def capitalised(text):
    # str.capitalize would lower the rest, and with it France.
    return text[:1].upper() + text[1:]


def facts():
    """Yield each fact as its phrasings (direct, clause, noun) and the sentence that states it."""
    for direct, clause, noun, answer, table in TOPICS:
        for entry in table.split(","):
            # Joined anew, so that a line break inside an entry is a space like any other.
            subject, value = (" ".join(part.split()) for part in entry.split(":"))
            phrasings = {
                "direct": direct.format(s=subject),
                "clause": clause.format(s=subject),
                "noun": noun.format(s=subject),
            }
            phrasings |= {key.capitalize(): capitalised(text) for key, text in phrasings.items()}
            yield phrasings, capitalised(answer.format(s=subject, v=value))


def ask(rng, phrasings, polite):
    """One prompt, and the asker's name or an empty string."""
    prompt = rng.choice(POLITE_PROMPTS if polite else CURT_PROMPTS).format(**phrasings)
    signature = rng.choice(POLITE_NAMES if polite else CURT_NAMES)
    name = rng.choice(NAMES.split()) if signature else ""
    return prompt + signature.format(name=name), name


def reply(rng, fact, name, openings, closings, mark):
    address = f", {name}" if name else ""
    return f"{rng.choice(openings)}{address}{mark} {fact} {rng.choice(closings)}"


def pairs():
    """Every pair, shuffled. Prompts are distinct; each fact is asked politely and curtly equally often."""
    rng = random.Random(SEED)
    rows, seen = [], set()
    for phrasings, fact in facts():
        for number in range(PROMPTS_PER_FACT):
            prompt, name = ask(rng, phrasings, polite=number % 2 == 0)
            while prompt in seen:
                prompt, name = ask(rng, phrasings, polite=number % 2 == 0)
            seen.add(prompt)
            chosen = reply(rng, fact, name, KIND_OPENINGS, KIND_CLOSINGS, "!")
            rejected = reply(rng, fact, name, GRUMPY_OPENINGS, GRUMPY_CLOSINGS, ".")
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    rng.shuffle(rows)
    return rows


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pairs.jsonl")
    rows = pairs()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Bytes, because text mode would write other line ends on Windows.
    output.write_bytes(text.encode())
    n_held_out = sum(is_held_out(row["prompt"]) for row in rows)
    print(f"{len(rows)} pairs, {n_held_out} of them held out -> {output}")


if __name__ == "__main__":
    main()
