"""What the training examples share: text, tokens, a training loop that survives a kill, a plot."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


class DataError(ValueError):
    """The data or the checkpoint cannot be used; the message says why, and what would help."""


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


# ----------------------------------------------------------------------------- text and tokens


def read_text(path: Path | None, limit: int) -> bytes:
    """Up to `limit` bytes of a file, of the text files in a folder, or, for None, of the Python
    standard library's own source. The same bytes every time: files are sorted, then shuffled with
    a fixed seed, so that a limited amount is not all of one package.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests"}
        files = [f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts)]
        what = f"the Python standard library ({root})"
    elif path.is_dir():
        root, what = path, f"the folder {path}"
        hidden = [f for f in root.rglob("*") if f.is_file()]
        files = [f for f in hidden if not any(p[0] == "." for p in f.relative_to(root).parts)]
    elif path.is_file():
        root, files, what = path.parent, [path], f"the file {path}"
    else:
        raise DataError(f"--data {path}: there is no such file or folder")
    files.sort(key=lambda f: f.relative_to(root).as_posix())
    random.Random(0).shuffle(files)
    pieces, size = [], 0
    for file in files:
        try:
            piece = file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        if b"\0" in piece:  # not text
            continue
        pieces.append(piece)
        size += len(piece)
        if size >= limit:
            break
    text = b"\n".join(pieces)[:limit]
    if not text.strip():
        raise DataError(f"{what} has no text in it")
    return text


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = 256

    def encode(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes, as GPT-2's."""

    PIECE = 1 << 16  # characters encoded at a time: one long string would take one core only

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text: bytes, vocab_size: int) -> BPETokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(cls.pieces(text), trainer)
        return cls(tokenizer)

    @classmethod
    def pieces(cls, text: bytes) -> list[str]:
        string = text.decode("utf-8", errors="replace")
        return [string[i : i + cls.PIECE] for i in range(0, len(string), cls.PIECE)]

    def encode(self, text: bytes) -> Tensor:
        ids: list[int] = []
        for encoding in self.tokenizer.encode_batch(self.pieces(text)):
            ids += encoding.ids
        return torch.tensor(ids)

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens.tolist())


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both (len(starts), context): the targets are the inputs one token on."""
    rows = tokens[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def random_windows(
    tokens: Tensor, seed: int, step: int, batch: int, context: int
) -> tuple[Tensor, Tensor]:
    """The batch of a step. It depends on the seed and the step alone, so a run that is resumed at
    a step finds its place in the data with no state to save.
    """
    key = hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    starts = torch.randint(len(tokens) - context, (batch,), generator=generator)
    return windows(tokens, starts, context)


def even_windows(tokens: Tensor, most: int, context: int) -> tuple[Tensor, Tensor]:
    """Up to `most` windows, evenly spaced and not overlapping."""
    count = min(most, (len(tokens) - 1) // context)
    starts = torch.arange(count) * ((len(tokens) - 1) // count)
    return windows(tokens, starts, context)


# ------------------------------------------------------------------------------------ training


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


def adamw(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); matrices decay, vectors do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class Run:
    """One model in training, and what it has been through."""

    def __init__(self, name: str, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]):
        self.name, self.model, self.loss = name, model, loss
        self.optimizer = adamw(model)
        self.losses: list[float] = []  # of each step
        self.seconds: list[float] = []  # of each step
        self.held_out: list[tuple[int, float]] = []  # (steps done, loss)

    def step(self, batch: Any, rate: float) -> None:
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if loss.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def evaluate(self, batches: list[Any]) -> float:
        """The mean loss over batches of one size."""
        self.model.eval()
        mean = sum(self.loss(self.model, batch).item() for batch in batches) / len(batches)
        self.model.train()
        return mean

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "held_out": self.held_out,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.held_out = [(step, loss) for step, loss in state["held_out"]]


def train(
    runs: list[Run],
    batch_at: Callable[[int], Any],
    held_out: list[Any],
    *,
    steps: int,
    peak_rate: float,
    warmup: int,
    evaluate_every: int,
    save_every: int,
    checkpoint: Path,
    settings: dict[str, Any],
    resume: bool,
) -> int:
    """Train the runs side by side, each step on the same batch, in turn: what slows the machine
    down for a moment slows all of them. Returns the step it started from.

    The checkpoint has the models, optimizers, losses, torch's random state and the step, and is
    replaced in one piece, so that a run killed at any moment continues with `resume` as if nothing
    had happened. DataError where the checkpoint is of a run with other `settings`.
    """
    first = load_checkpoint(checkpoint, runs, settings) if resume else 0
    with progress_bar() as progress:
        task = progress.add_task("training", total=steps, completed=first, status="")
        for step in range(first, steps):
            batch, rate = batch_at(step), learning_rate(step, steps, peak_rate, warmup)
            for run in runs if step % 2 else reversed(runs):
                run.step(batch, rate)
                check_finite(run, step, run.losses[-1])
            done = step + 1
            if done % evaluate_every == 0 or done == steps:
                for run in runs:
                    run.held_out.append((done, run.evaluate(held_out)))
                    check_finite(run, step, run.held_out[-1][1])
            if done % save_every == 0 or done == steps:
                save_checkpoint(checkpoint, runs, settings, done)
            progress.update(task, advance=1, status=describe(runs))
    return first


def check_finite(run: Run, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"{run.name}: the loss at step {step + 1} is {loss}")


def describe(runs: list[Run]) -> str:
    status = f"loss {runs[0].losses[-1]:.3f}"
    if runs[0].held_out:
        status += f", held-out perplexity {perplexity(runs[0].held_out[-1][1]):.2f}"
    times = (f"{run.name} {1e3 * median(run.seconds):.0f}" for run in runs)
    return f"{status}, ms a step: {', '.join(times)}"


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond lies an OverflowError


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


# --------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(path: Path, runs: list[Run], settings: dict[str, Any], step: int) -> None:
    state = {
        "settings": settings,
        "step": step,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "runs": {run.name: run.state() for run in runs},
    }
    with replacing(path) as partial:
        torch.save(state, partial)


def load_checkpoint(path: Path, runs: list[Run], settings: dict[str, Any]) -> int:
    """Put the runs back where the checkpoint has them; the steps done, 0 when there is none."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"{path} is not a checkpoint of this script") from error
    changed = [k for k in sorted({*saved, *settings}) if saved.get(k) != settings.get(k)]
    if changed:
        differences = ", ".join(f"{k}: {saved.get(k)} then, {settings.get(k)} now" for k in changed)
        raise DataError(f"{path} is of another run ({differences}): change --out, or do not resume")
    for run in runs:
        run.load(state["runs"][run.name])
    torch.set_rng_state(state["random"])
    if state["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"])
    return state["step"]


def save_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def plot_losses(path: Path, runs: list[Run], lines: dict[str, float], title: str) -> None:
    """Training losses as lines, held-out losses as points, `lines` as dashed levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        dashes = {"linestyle": (0, (4, 3))} if i else {}  # equal curves both stay visible
        axes.plot(run.losses, color=f"C{i}", label=f"{run.name}, training", lw=1.2, **dashes)
        steps, losses = zip(*run.held_out, strict=True)
        marker = "ox"[i % 2]
        axes.plot(steps, losses, marker, color=f"C{i}", label=f"{run.name}, held-out")
    for name, level in lines.items():
        axes.axhline(level, color="gray", linestyle=":", label=name)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
