"""Hugging Face flows on fastattn, offline: random weights, a tokenizer trained on the spot.

    python examples/transformers_offline.py

The text-generation pipeline on a small GPT-2, and AutoModelForSequenceClassification of a small
BERT, trained for a few steps, each with attn_implementation="fastattn" and norms swapped by patch,
beside the same models with "eager". Needs transformers and tokenizers: pip install '.[examples]'.
"""

from __future__ import annotations

import argparse

import tokenizers
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
)

import fastattn
from fastattn.integrations import transformers as integration

GOOD = ("a warm and witty film", "the best songs in years", "I laughed and cried", "a joy")
BAD = (
    "a dull and endless film",
    "the worst songs in years",
    "I yawned and left",
    "a chore to read",
)


def train_tokenizer(texts: list[str], size: int = 200) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the texts, with padding on the left for generation."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def generate(tokenizer: PreTrainedTokenizerFast, attention: str) -> list[str]:
    """What the pipeline writes on after prompts of different lengths, greedily."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    if attention == "fastattn":
        print(fastattn.patch(model))
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["a warm film", "the best songs in years", "I"]
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": 3}
    return [answers[0]["generated_text"] for answers in pipeline(prompts, **options)]


def classify(tokenizer: PreTrainedTokenizerFast, attention: str, epochs: int = 10) -> list[float]:
    """The losses of training a classifier of praise and blame."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    if attention == "fastattn":
        fastattn.patch(model)
    batch = tokenizer([*GOOD, *BAD], padding=True, padding_side="right", return_tensors="pt")
    batch.pop("token_type_ids", None)
    labels = torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(epochs):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(arguments)
    integration.register()
    tokenizer = train_tokenizer([*GOOD, *BAD])
    eager, ours = (generate(tokenizer, attention) for attention in ("eager", "fastattn"))
    print("\n".join(ours))
    if eager != ours:
        print(f"eager wrote something else: {eager}")
        return 1
    eager_losses, losses = (classify(tokenizer, attention) for attention in ("eager", "fastattn"))
    print("losses with eager   ", *(f"{loss:.4f}" for loss in eager_losses))
    print("losses with fastattn", *(f"{loss:.4f}" for loss in losses))
    return int(any(abs(a - b) > 1e-3 for a, b in zip(eager_losses, losses, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
