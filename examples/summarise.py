"""Train an encoder-decoder to summarise: a docstring, and what it documents, to its first line.

    python examples/summarise.py                         # docstrings of Python's library; 3 minutes
    python examples/summarise.py --data pairs.tsv        # your own: text, tab, summary
    python examples/summarise.py --attention both        # fused and naive side by side
    python examples/summarise.py ... --resume            # go on after a kill

It writes to --out: metrics.json, loss.png, checkpoint.pt. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

try:
    from data import Pair, docstrings, read_pairs
    from rich.console import Console
    from seq2seq import Corpus, learn, make_corpus, pair_arguments
    from training import run_script
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None


def parser() -> argparse.ArgumentParser:
    defaults = {"steps": 1800, "batch": 32, "lr": 3e-3}
    model = {"layers": 2, "heads": 4, "dropout": 0.1, "longest_source": 64, "longest_target": 24}
    parser = pair_arguments(__doc__, "summarise", **defaults, **model)
    parser.set_defaults(quick_defaults={"attention": "both", "steps": 160, "held_out": 100})
    return parser


def docstring_pairs() -> tuple[list[Pair], list[Pair]]:
    """(pairs to summarise, pairs to train on besides). A source is what a docstring documents, its
    name and arguments, and all of its text but the first line, which is the target. Docstrings of
    one line have a name to learn from and no text to summarise. Where the first line is no sentence
    of its own, but goes on in the next, it is no summary.
    """
    texts, names = [], []
    for _, signature, summary, body in docstrings():
        if len(body.split()) >= 5 and (summary[-1] in ".!?:" or not body[0].islower()):
            texts.append(Pair(f"{signature} {body}", summary))
        elif not body:
            names.append(Pair(signature, summary))
    return texts, names


def rouge(summaries: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE (Lin 2004) in percent, the mean over the summaries: F1 of what a summary and its
    reference have in common, which is words (1), pairs of words (2) or their longest common
    subsequence of words (L); rouge-score's tokens, without stemming.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = RougeScorer(list(kinds.values()))
    scores = [scorer.score(*texts) for texts in zip(references, summaries, strict=True)]
    return {
        name: 100.0 * sum(score[kind].fmeasure for score in scores) / len(scores)
        for name, kind in kinds.items()
    }


def leads(corpus: Corpus) -> list[str]:
    """The first words of each held-out source, as many as a summary to train on has on average: of
    a docstring these begin with its name and arguments, which say more than the text's first words.
    """
    lengths = [len(pair.target.split()) for pair in corpus.training]
    mean = round(sum(lengths) / len(lengths))
    return [" ".join(pair.source.split()[:mean]) for pair in corpus.held_out]


def any_summaries(corpus: Corpus) -> list[str]:
    """For each held-out text, the summary of another one."""
    draw = random.Random(0)
    return [draw.choice(corpus.training).target for _ in corpus.held_out]


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    pairs, more = docstring_pairs() if args.data is None else (read_pairs(args.data), [])
    corpus = make_corpus(args, pairs, truncate=True, training_only=more)
    baselines = {
        "the first words": leads(corpus),
        "a summary of another text": any_summaries(corpus),
    }
    return learn(args, console, corpus, rouge, baselines, "Summaries")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work, lambda args: ["tokenizers", "rouge_score"])


if __name__ == "__main__":
    main()
