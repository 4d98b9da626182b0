"""The attention of a sentence as a picture: how much each token takes from each, head by head.

    python examples/show_attention.py                               # "The cat sat on the mat"
    python examples/show_attention.py --text "import os" --model runs/lm

The weights softmax(q k^T / sqrt(d)) exist in the naive path alone: the fused kernel never writes
them down. So they are computed beside it from the same q and k, and what the fused kernel returns
is asserted to be these weights times v. A row of the picture is a token that looks, a column one
that is looked at. It writes attention.png and attention.json. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from data import DataError
    from rich.console import Console
    from train_lm import load_or_train
    from training import attentions, basic_arguments, plotting, run_script, save_json
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

import fastattn
from fastattn.models.kernels import naive_attention_weights
from fastattn.models.transformer import MultiHeadAttention


def parser() -> argparse.ArgumentParser:
    quick = "nothing to shorten: it takes a second"
    parser = basic_arguments(__doc__, out="runs/attention", quick=quick)
    parser.add_argument("--text", default="The cat sat on the mat")
    parser.add_argument("--model", type=Path, help="a folder that train_lm.py wrote to [runs/lm]")
    return parser


class Watch:
    """Stands in for a model's attention kernel: keeps the weights, returns what the kernel does."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []  # of each call, (B, H, Sq, Sk)
        self.errors: list[float] = []  # of each call, the largest between fused and weights @ v

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        causal, bias = options["causal"], options["bias"]
        weights = naive_attention_weights(q, k, causal=causal, bias=bias)
        expected = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        fused = fastattn.attention(q, k, v, causal=causal, bias=bias)
        torch.testing.assert_close(fused, expected)  # AssertionError if not
        self.weights.append(weights)
        self.errors.append((fused - expected).abs().max().item())
        return fused


@torch.no_grad()
def watch(model: nn.Module, tokens: Tensor) -> Watch:
    """Run the model on tokens (1, S) with every attention watched."""
    seen = Watch()
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.kernels = module.kernels._replace(attention=seen)
    model.eval()(tokens)
    return seen


def draw(path: Path, weights: Tensor, labels: Sequence[str], title: str) -> None:
    """weights (layers, heads, S, S)"""
    layers, heads, length, _ = weights.shape
    side = max(2.5, 0.28 * length)
    size = (side * heads + 1, side * layers + 1)
    with plotting(path, nrows=layers, ncols=heads, figsize=size, squeeze=False) as grid:
        for layer in range(layers):
            for head in range(heads):
                axes = grid[layer][head]
                axes.imshow(weights[layer, head], vmin=0.0, vmax=1.0, cmap="Blues")
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
                axes.set_xticks(range(length), labels, rotation=90, fontsize=7)
                axes.set_yticks(range(length), labels, fontsize=7)
        grid[0][0].figure.suptitle(title)


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    kind = attentions(args)[0]
    model, tokenizer, source = load_or_train(args.model, args.out, kind, console)
    ids = tokenizer.encode(args.text.encode())
    if not len(ids):
        raise DataError("--text is empty")
    if len(ids) > model.config.max_len:
        raise DataError(f"--text has {len(ids)} tokens, the model reads {model.config.max_len}")
    labels = [
        tokenizer.decode(one).replace("\n", "\\n").replace("$", r"\$") for one in ids[:, None]
    ]
    seen = watch(model.to(args.device), ids[None].to(args.device))
    weights = torch.stack([w[0] for w in seen.weights]).cpu()
    draw(args.out / "attention.png", weights, labels, f"{args.text!r}, {source}")
    save_json(args.out / "attention.json", {"tokens": labels, "weights": weights.tolist()})
    console.print(f"model: {source}; tokens: {labels}")
    console.print(
        f"{weights.shape[0]} layers of {weights.shape[1]} heads; the fused output is the weights "
        f"times v, to within {max(seen.errors):.1e}"
    )
    console.print(f"written to {args.out}: attention.png, attention.json, metrics.json")
    return {
        "model_from": source,
        "tokens": labels,
        "layers": weights.shape[0],
        "heads": weights.shape[1],
        "largest_difference": max(seen.errors),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work)


if __name__ == "__main__":
    main()
