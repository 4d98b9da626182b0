"""The attention of a sentence as a picture: how much each token takes from each, head by head.

    python examples/show_attention.py                               # "The cat sat on the mat"
    python examples/show_attention.py --text "import os"
    python examples/show_attention.py --checkpoint runs/bert/checkpoint.pt      # BERT's, both ways

The weights softmax(q k^T / sqrt(d)) exist in the naive path alone: the fused kernel never writes
them down. So they are computed beside it from the same q and k, and what the kernel returns is
asserted to be these weights times v. A row of the picture is a token that looks, a column one that
is looked at: a language model looks back alone, BERT both ways. It writes attention.png and
attention.json. Needs `pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    import pretrain
    import train_lm
    from data import DataError
    from rich.console import Console
    from training import (
        CHECKPOINT_HELP,
        attentions,
        model_arguments,
        plotting,
        read_checkpoint,
        run_script,
        save_json,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models.kernels import KERNELS, naive_attention_weights
from fastattn.models.transformer import MultiHeadAttention


def parser() -> argparse.ArgumentParser:
    quick = "nothing to shorten: it takes a second"
    parser = model_arguments(__doc__, out="runs/attention", quick=quick)
    parser.add_argument("--text", default="The cat sat on the mat", help="[%(default)s]")
    left = f"what train_lm.py or pretrain.py left {CHECKPOINT_HELP}"
    parser.add_argument("--checkpoint", type=Path, help=left)
    return parser


class Watch:
    """Stands in for a model's attention kernel: keeps the weights, returns what the kernel does."""

    def __init__(self, kernel: Callable[..., Tensor]):
        self.kernel = kernel
        self.weights: list[Tensor] = []  # of each call, (B, H, Sq, Sk)
        self.errors: list[float] = []  # of each call, the largest between kernel and weights @ v

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        weights = naive_attention_weights(q, k, causal=options["causal"], bias=options["bias"])
        expected = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        output = self.kernel(q, k, v, **options)
        torch.testing.assert_close(output, expected)  # AssertionError if not
        self.weights.append(weights)
        self.errors.append((output - expected).abs().max().item())
        return output


@torch.no_grad()
def watch(model: nn.Module, tokens: Tensor, kernel: Callable[..., Tensor]) -> Watch:
    """Run the model on tokens (1, S), every attention of it on this kernel, and watched."""
    seen = Watch(kernel)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.kernels = module.kernels._replace(attention=seen)
    model.eval()(tokens)
    return seen


class Reader(NamedTuple):
    """A trained model, and how a text becomes its tokens."""

    model: nn.Module
    tokenizer: Any
    frame: tuple[list[int], list[int]]  # the special tokens before and after a text
    special: tuple[str, ...]  # the names of the first tokens

    def tokens(self, text: str) -> Tensor:
        """(1, S)"""
        before, after = self.frame
        return torch.tensor([[*before, *self.tokenizer.encode(text.encode()).tolist(), *after]])

    def labels(self, tokens: Tensor) -> list[str]:
        return [
            self.special[token] if token < len(self.special) else self.tokenizer.decode(one)
            for token, one in zip(tokens[0].tolist(), tokens[0].split(1), strict=True)
        ]


def load(checkpoint: Path, attention: str) -> Reader:
    """The language model or BERT of a checkpoint."""
    if read_checkpoint(checkpoint, "lm", "bert")["settings"]["task"] == "lm":
        return Reader(*train_lm.load(checkpoint, attention), ([], []), ())
    before = pretrain.read_pretrained(checkpoint)
    frame = [pretrain.CLS], [pretrain.SEP]
    return Reader(before.model(attention), before.tokenizer, frame, pretrain.SPECIAL)


def literal(text: str) -> str:
    """A text as matplotlib shows it: in one line, and a dollar sign begins no formula."""
    return text.replace("\n", "\\n").replace("$", r"\$")


def draw(path: Path, weights: Tensor, labels: Sequence[str], title: str) -> None:
    """weights (layers, heads, S, S)"""
    shown = [literal(label) for label in labels]
    layers, heads, length, _ = weights.shape
    side = max(2.5, 0.28 * length)
    size = (side * heads + 1, side * layers + 1)
    with plotting(path, nrows=layers, ncols=heads, figsize=size, squeeze=False) as grid:
        for layer in range(layers):
            for head in range(heads):
                axes = grid[layer][head]
                axes.imshow(weights[layer, head], vmin=0.0, vmax=1.0, cmap="Blues")
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
                axes.set_xticks(range(length), shown, rotation=90, fontsize=7)
                axes.set_yticks(range(length), shown, fontsize=7)
        grid[0][0].figure.suptitle(literal(title))


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if not args.text:
        raise DataError("--text is empty")
    checkpoint = train_lm.find_or_train(args, console)
    kinds = attentions(args)
    reader = load(checkpoint, kinds[0])
    tokens, longest = reader.tokens(args.text), reader.model.config.max_len
    if tokens.shape[1] > longest:
        raise DataError(f"--text has {tokens.shape[1]} tokens, the model reads {longest}")
    labels = reader.labels(tokens)
    model, tokens = reader.model.to(args.device), tokens.to(args.device)
    seen = {kind: watch(model, tokens, KERNELS[kind].attention) for kind in kinds}
    weights = torch.stack([w[0] for w in seen[kinds[0]].weights]).cpu()
    draw(args.out / "attention.png", weights, labels, f"{args.text!r}, {checkpoint}")
    save_json(args.out / "attention.json", {"tokens": labels, "weights": weights.tolist()})
    console.print(f"model: {checkpoint}; tokens: {labels}")
    console.print(f"{weights.shape[0]} layers of {weights.shape[1]} heads")
    for kind, one in seen.items():
        console.print(f"{kind} attention is the weights times v, to within {max(one.errors):.1e}")
    console.print(f"written to {args.out}: attention.png, attention.json, metrics.json")
    return {
        "checkpoint": str(checkpoint),
        "tokens": labels,
        "layers": weights.shape[0],
        "heads": weights.shape[1],
        "largest_difference": {kind: max(one.errors) for kind, one in seen.items()},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work)


if __name__ == "__main__":
    main()
