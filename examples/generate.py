"""Let a language model go on: greedy, by sampling, by beam search, as a stream, with a KV cache.

    python examples/train_lm.py                               # first: the model
    python examples/generate.py                               # every way to go on, three prompts
    python examples/generate.py --prompt "def main(" --way top-p --stop "\\n"
    python examples/generate.py --measure                     # what the KV cache costs and saves

Prompts of unequal length make one batch, padded on the left. Tokens appear as they are made, but
those of a beam search, which are known at its end. --measure writes cache.png. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from data import DataError, pad
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text
    from train_lm import find_or_train, load
    from training import (
        CHECKPOINT_HELP,
        attentions,
        finite,
        median,
        model_arguments,
        number,
        plotting,
        positive,
        run_script,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models import LanguageModel

WAYS = ("greedy", "temperature", "top-k", "top-p", "beam")
PROMPTS = ("def ", "import os\n\nclass ", "    for i in range(")


def parser() -> argparse.ArgumentParser:
    parser = model_arguments(__doc__, out="runs/generate", quick="short texts and lengths")
    add = parser.add_argument
    add("--checkpoint", type=Path, help=f"what train_lm.py left {CHECKPOINT_HELP}")
    add("--prompt", action="append", help="may be given several times")
    add("--way", action="append", choices=WAYS, help="may be given several times [all of them]")
    add("--max-new-tokens", type=positive, default=48, help="[48]")
    add("--stop", type=text_to_stop_at, help="end where a token has this text in it; \\n works")
    temperature = number(float, "a number of at least 0", lambda x: 0.0 <= x < float("inf"))
    add("--temperature", type=temperature, default=0.8, help="of all ways that draw [0.8]")
    add("--top-k", type=positive, default=20, help="[20]")
    top_p = number(float, "in (0, 1]", lambda x: 0.0 < x <= 1.0)
    add("--top-p", type=top_p, default=0.9, help="[0.9]")
    add("--beams", type=positive, default=4, help="[4]")
    add("--length-penalty", type=finite, default=1.0, help="of the beam search [1]")
    add("--measure", action="store_true", help="the KV cache: memory and time against recomputing")
    add("--lengths", type=positive, nargs="+", default=[64, 128, 256, 512, 1024], help="to measure")
    parser.set_defaults(quick_defaults={"max_new_tokens": 12, "lengths": [32, 64, 128]})
    return parser


def options_of(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is asked for."""
    sampling = {"temperature": args.temperature, "seed": args.seed}
    return {
        "greedy": {"do_sample": False},
        "temperature": sampling,
        "top-k": {**sampling, "top_k": args.top_k},
        "top-p": {**sampling, "top_p": args.top_p},
        "beam": {"num_beams": args.beams, "length_penalty": args.length_penalty},
    }[way]


def text_to_stop_at(text: str) -> str:
    try:  # so that \n can be typed
        unescaped = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.reason}") from None
    if not unescaped:
        raise argparse.ArgumentTypeError("must not be empty")
    return unescaped


def stop_tokens(tokenizer: Any, text: str | None) -> list[int]:
    """The tokens that have this text in them."""
    if text is None:
        return []
    found = [i for i in range(tokenizer.vocab_size) if text in tokenizer.decode(torch.tensor([i]))]
    if not found:
        raise DataError(f"--stop {text!r}: no token has that in it; a single character may help")
    return found


class Stream:
    """The texts of a batch on the terminal, token by token."""

    def __init__(self, prompts: Sequence[str], tokenizer: Any, live: Live | None = None):
        self.prompts, self.tokenizer, self.live = prompts, tokenizer, live
        self.rows: list[list[int]] = [[] for _ in prompts]

    def __call__(self, tokens: Tensor) -> None:  # (B,)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        if self.live is not None:
            self.live.update(self.panels())

    def texts(self) -> list[str]:
        return [self.tokenizer.decode(torch.tensor(row)) for row in self.rows]

    def panels(self) -> Group:
        parts = zip(self.prompts, self.texts(), strict=True)
        return Group(*(Panel(Text.assemble((prompt, "dim"), text)) for prompt, text in parts))


def go_on(
    args: argparse.Namespace, console: Console, model: LanguageModel, tokenizer: Any
) -> list[dict[str, Any]]:
    """Every way of going on from the prompts, shown; what metrics.json says of them."""
    prompts = args.prompt or list(PROMPTS)
    if not all(prompts):
        raise DataError("a --prompt must not be empty")
    encoded = [tokenizer.encode(prompt.encode()).tolist() for prompt in prompts]
    tokens, mask = pad(encoded, 0, left=True)
    room = model.config.max_len - tokens.shape[1]
    if room < 1:
        raise DataError(
            f"a prompt of {tokens.shape[1]} tokens leaves no room: the model reads "
            f"{model.config.max_len}"
        )
    count = min(args.max_new_tokens, room)
    stops = stop_tokens(tokenizer, args.stop)
    made = []
    for way in args.way or WAYS:
        options = options_of(way, args)
        named = ", ".join(f"{k}={v}" for k, v in options.items() if k != "seed")
        console.rule(f"{way}: {named}")
        started = time.perf_counter()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            shown = Stream(prompts, tokenizer, live)
            if way != "beam" or args.beams == 1:
                options["stream"] = lambda new, shown=shown: (shown(new), shown.live.refresh())
            output = model.generate(
                tokens.to(args.device),
                count,
                mask=mask.to(args.device),
                stop_tokens=stops,
                **options,
            )
        seconds = time.perf_counter() - started
        final = Stream(prompts, tokenizer)
        for row, ids in enumerate(output[:, tokens.shape[1] :].tolist()):
            ends = [i + 1 for i, token in enumerate(ids) if token in stops]
            final.rows[row] = ids[: ends[0]] if ends else ids
        console.print(final.panels())
        texts = final.texts()
        made.append({"way": way, "options": named, "seconds": seconds, "texts": texts})
        new = sum(map(len, final.rows))
        console.print(f"{new} tokens in {seconds:.2f} s", style="dim")
    return made


# ------------------------------------------------------------------------------- the KV cache


def token_seconds(model: LanguageModel, prompt: Tensor, use_cache: bool, count: int = 6) -> float:
    """The time of a token after this prompt: the median of those between one and the next."""
    times: list[float] = []
    model.generate(
        prompt,
        count,
        do_sample=False,
        use_cache=use_cache,
        stream=lambda _: times.append(time.perf_counter()),
    )
    return median([after - before for before, after in pairwise(times)])


def cache_bytes(model: LanguageModel, prompt: Tensor) -> int:
    """The memory of the keys and values of all layers, after this prompt."""
    cache = model.decoder.new_cache(prompt.shape[1])
    with torch.no_grad():
        model.decoder(prompt, cache=cache)
    return sum(own.nbytes + cross.nbytes for own, cross in cache)


def measure(args: argparse.Namespace, model: LanguageModel) -> list[dict[str, Any]]:
    """For growing lengths: what a token takes with the cache and by recomputing, and the memory of
    the cache. The weights are random: the trained model reads too few tokens, and time does not
    depend on their values.
    """
    rows = []
    for kind in attentions(args):
        config = replace(model.config, max_len=max(args.lengths) + 8, attention=kind)
        torch.manual_seed(args.seed)
        measured = LanguageModel(config).to(args.device).eval()
        for length in sorted(args.lengths):
            prompt = torch.randint(config.vocab_size, (1, length), device=args.device)
            rows.append(
                {
                    "attention": kind,
                    "length": length,
                    "cache_bytes": cache_bytes(measured, prompt),
                    "cached_s": token_seconds(measured, prompt, use_cache=True),
                    "recomputed_s": token_seconds(measured, prompt, use_cache=False),
                }
            )
    return rows


def show_measured(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="A token after so many others")
    table.add_column("kernels")
    for column in ("tokens", "cache", "with the cache", "recomputed", "saved"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["attention"],
            f"{row['length']:,}",
            f"{row['cache_bytes'] / 1e6:.2f} MB",
            f"{1e3 * row['cached_s']:.2f} ms",
            f"{1e3 * row['recomputed_s']:.2f} ms",
            f"{row['recomputed_s'] / row['cached_s']:.1f} x",
        )
    console.print(table)


def plot_measured(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with plotting(path, ncols=2, figsize=(10, 4)) as (times, memory):
        for kind in dict.fromkeys(row["attention"] for row in rows):
            mine = [row for row in rows if row["attention"] == kind]
            lengths = [row["length"] for row in mine]
            for name, label in (("recomputed_s", "recomputed"), ("cached_s", "with the cache")):
                line = [1e3 * row[name] for row in mine]
                times.plot(lengths, line, "o-", label=f"{kind}, {label}")
            memory.plot(lengths, [row["cache_bytes"] / 1e6 for row in mine], "o-", label=kind)
        times.set(xlabel="tokens before it", ylabel="ms a token", title="Time")
        memory.set(xlabel="tokens", ylabel="MB", title="Memory of the KV cache", ylim=(0, None))
        for axes in (times, memory):
            axes.legend()
            axes.grid(alpha=0.3)


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    checkpoint = find_or_train(args, console)
    model, tokenizer = load(checkpoint, attentions(args)[0])
    model.to(args.device)
    console.print(f"model: {checkpoint}")
    made = go_on(args, console, model, tokenizer)
    metrics: dict[str, Any] = {"checkpoint": str(checkpoint), "ways": made}
    if args.measure:
        metrics["measured"] = measure(args, model)
        show_measured(console, metrics["measured"])
        plot_measured(args.out / "cache.png", metrics["measured"])
        console.print(f"written to {args.out}: metrics.json, cache.png")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Generate as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work)


if __name__ == "__main__":
    main()
