"""Texts with something to learn, for the tests of BERT's examples, and a model pre-trained on them."""

import random

import pretrain

TOPICS = {
    "garden": ("rose", "tulip", "hedge", "lawn", "spade", "seed"),
    "harbour": ("boat", "anchor", "sail", "gull", "tide", "pier"),
    "kitchen": ("oven", "spoon", "kettle", "bread", "salt", "pan"),
    "night": ("moon", "star", "owl", "lamp", "dream", "comet"),
}
TINY = ["--d-model=32", "--layers=1", "--heads=2", "--vocab=330", "--context=40", "--lr=6e-3"]


def write_texts(folder, passages=150, topics=TOPICS):
    """A folder for each topic, with passages of two or three sentences of the topic's own words."""
    draw = random.Random(0)
    for topic, words in topics.items():
        (folder / topic).mkdir(parents=True)
        paragraphs = []
        for _ in range(passages):
            pairs = [draw.sample(words, 2) for _ in range(draw.choice((2, 3)))]
            paragraphs.append(" ".join(f"The {a} is near the {b}." for a, b in pairs))
        (folder / topic / "text.txt").write_text("\n\n".join(paragraphs))
    return folder


def pretrain_tiny(texts, out, *extra):
    options = [*TINY, "--data", str(texts), "--out", str(out), "--batch=16", "--steps=150"]
    return pretrain.main([*options, *extra])
