"""The pictures demo: a coloured shape in each picture, a right and a wrong description of it. Right is preferred.

Owns the drawings, the questions and the answers. Both answers of a pair have the same words but for one, a colour or a
shape, so only who looks at the picture can tell them apart. A seed fixes every byte.

    python data/images-demo/make_pairs.py [OUTPUT_FOLDER]

It writes pairs.jsonl and pictures/. make_reference.py builds the model that these pairs are meant for.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SEED = 23
N_PAIRS = 1200
SIZE = 32  # pixels of a picture's sides
# The reference often takes one for the next, in a circle.
COLOURS = {
    "red": (214, 39, 40),
    "pink": (244, 140, 190),
    "yellow": (240, 215, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "purple": (140, 60, 170),
}
SHAPES = ("circle", "square", "cross", "triangle")
BACKGROUNDS = ((250, 250, 250), (230, 225, 215), (215, 225, 235))
QUESTIONS = (
    "What is in the picture?",
    "Describe the picture.",
    "What do you see here?",
    "Tell me what this shows.",
)
SENTENCES = ("It is a {colour} {shape}.", "I see a {colour} {shape}.", "The picture shows a {colour} {shape}.")


def draw(rng, colour, shape):
    """A shape of a random size, about in the middle."""
    picture = Image.new("RGB", (SIZE, SIZE), rng.choice(BACKGROUNDS))
    pen = ImageDraw.Draw(picture)
    size = rng.randint(2 * SIZE // 3, 5 * SIZE // 6)
    left, top = ((SIZE - size) // 2 + rng.randint(-2, 2) for _ in range(2))
    right, bottom, third = left + size, top + size, size // 3
    paint = {"fill": COLOURS[colour]}
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), **paint)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), **paint)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], **paint)
    else:
        pen.rectangle((left + third, top, right - third, bottom), **paint)
        pen.rectangle((left, top + third, right, bottom - third), **paint)
    return picture


def answers(rng, colour, shape, steps=(1, 1, 2, 3)):
    """A right description, and the same with a colour or a shape that is some steps further."""
    sentence = rng.choice(SENTENCES)
    right, n = {"colour": colour, "shape": shape}, rng.choice(steps)
    wrong = {"colour": following(COLOURS, colour, n)} if rng.random() < 0.5 else {"shape": following(SHAPES, shape, n)}
    return sentence.format(**right), sentence.format(**right | wrong)


def following(names, name, n):
    names = list(names)
    return names[(names.index(name) + n) % len(names)]


def pairs():
    """Yield each picture with its record, in TRL's shape."""
    rng = random.Random(SEED)
    for number in range(N_PAIRS):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        picture, name = draw(rng, colour, shape), f"pictures/{number:04}-{colour}-{shape}.png"
        chosen, rejected = answers(rng, colour, shape)
        parts = [{"type": "image"}, {"type": "text", "text": rng.choice(QUESTIONS)}]
        record = {
            "images": [name],
            "prompt": [{"role": "user", "content": parts}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        yield picture, record


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for picture, record in pairs():
        picture.save(output / record["images"][0])
        lines.append(json.dumps(record) + "\n")
    # Bytes, because text mode would write other line ends on Windows. Last, so that make finds it only when all is there.
    (output / "pairs.jsonl").write_bytes("".join(lines).encode())
    print(f"{len(lines)} pairs with a picture each -> {output / 'pairs.jsonl'}")


if __name__ == "__main__":
    main()
