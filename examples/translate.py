"""Train an encoder-decoder to translate, on what software says to its users in two languages.

    python examples/translate.py                         # English to Spanish; about 2 minutes
    python examples/translate.py --language nl           # or what the packages have besides
    python examples/translate.py --package django        # the catalogues of this package only
    python examples/translate.py --data pairs.tsv        # your own: source, tab, target
    python examples/translate.py --attention both        # fused and naive side by side
    python examples/translate.py ... --resume            # go on after a kill

It writes to --out: metrics.json, loss.png, checkpoint.pt. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from data import catalogue_pairs, read_pairs
    from rich.console import Console
    from seq2seq import Corpus, learn, make_corpus, pair_arguments
    from training import run_script
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

PACKAGES = ["plone.app.locales", "django"]


def parser() -> argparse.ArgumentParser:
    defaults = {"steps": 2500, "batch": 32, "lr": 3e-3}
    model = {"layers": 2, "heads": 4, "dropout": 0.1, "longest_source": 64, "longest_target": 64}
    parser = pair_arguments(__doc__, "translate", **defaults, **model)
    add = parser.add_argument
    packages = " and ".join(PACKAGES)
    add("--package", action="append", help=f"whose catalogues to read; repeatable [{packages}]")
    add("--language", default="es", help="to translate to, as the package calls it [es]")
    parser.set_defaults(quick_defaults={"attention": "both", "steps": 300, "held_out": 100})
    return parser


def bleu(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of a corpus (Papineni et al. 2002) in percent, one reference a translation, with the
    tokens of sacrebleu (Post 2018, arXiv:1804.08771), that figures may be compared:

        min(1, exp(1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4)

    p_n is the share of the translations' n-grams that are in their reference, r and c are the
    lengths of all references and translations.
    """
    from sacrebleu import corpus_bleu

    return {"BLEU": corpus_bleu(list(translations), [list(references)]).score}


def nearest_translations(corpus: Corpus) -> list[str]:
    """A translation memory: of each held-out source, the translation of the most similar source to
    train on, by the cosine of their tokens' counts, each weighted by how rare the token is.
    """

    def counts(sources: list[list[int]]) -> Tensor:
        rows = torch.zeros(len(sources), corpus.tokenizer.vocab_size)
        for row, tokens in zip(rows, sources, strict=True):
            row += torch.bincount(torch.tensor(tokens), minlength=len(row))
        return rows

    known = counts([pair.source for pair in corpus.training_tokens])
    asked = counts([pair.source for pair in corpus.held_out_tokens])
    rarity = torch.log(len(known) / (1.0 + (known > 0).sum(0)))
    similarity = F.normalize(asked * rarity) @ F.normalize(known * rarity).T
    return [corpus.training[i].target for i in similarity.argmax(1).tolist()]


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if args.data is not None:
        pairs = read_pairs(args.data)
    else:
        pairs = catalogue_pairs(args.package or PACKAGES, args.language)
    corpus = make_corpus(args, pairs)
    baselines = {
        "the source, copied": [pair.source for pair in corpus.held_out],
        "the nearest source's translation": nearest_translations(corpus),
    }
    return learn(args, console, corpus, bleu, baselines, "Translation")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the command line says; returns what metrics.json holds."""
    return run_script(
        parser(),
        argv,
        work,
        lambda args: ["tokenizers", "sacrebleu", *([] if args.data else ["polib"])],
    )


if __name__ == "__main__":
    main()
