"""The reference Transformer: fused equals naive, causality, masks, generation, bad input."""

import dataclasses
import itertools
import math

import pytest
import torch

from fastattn.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    LanguageModel,
    TransformerConfig,
    cross_entropy,
)
from fastattn.models.generation import Decoding, Sampler
from fastattn.models.kernels import KERNELS
from fastattn.models.transformer import IGNORE, KVCache, sinusoidal_positions

VOCAB = 53
NORMS = ("pre", "post")
KINDS = ("fused", "naive", "torch")
# The error of a whole model: a few hundred roundings, and gradients of order 0.1 and below.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def config(**fields):
    small = {
        "vocab_size": VOCAB,
        "max_len": 48,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "d_ff": 48,
    }
    return TransformerConfig(**{**small, **fields})


def build(model, seed=0, dtype=torch.float32, **fields):
    torch.manual_seed(seed)
    model = model(config(**fields)).to(dtype)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the trivial start: unit weights, zero biases, tiny logits
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=noise))
    return model


def each_kind(model, dtype=torch.float32, **fields):
    return [build(model, dtype=dtype, attention=kind, **fields) for kind in KINDS]


def tokens(*shape, seed=2):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def right_padding(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def left_padding(lengths, width):
    return right_padding(lengths, width).flip(1)


# ---- fused equals naive, and torch's own


def language_model_outputs(model, mask):
    x = tokens(3, 17)
    logits = model(x[:, :-1], None if mask is None else mask[:, :-1])
    targets = x[:, 1:] if mask is None else x[:, 1:].masked_fill(~mask[:, 1:], IGNORE)
    return logits, cross_entropy(logits, targets)


def encoder_outputs(model, mask):
    hidden = model(tokens(3, 17), mask)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    return hidden, (hidden * weights.to(hidden.dtype)).mean()


def encoder_decoder_outputs(model, mask):
    target = tokens(3, 12, seed=4)
    target_mask = None if mask is None else right_padding([11, 6, 1], 11)
    logits = model(tokens(3, 17), target[:, :-1], mask, target_mask)
    targets = target[:, 1:]
    if target_mask is not None:
        targets = targets.masked_fill(~target_mask, IGNORE)
    return logits, cross_entropy(logits, targets)


FAMILIES = {
    "language_model": (LanguageModel, language_model_outputs),
    "encoder": (Encoder, encoder_outputs),
    "encoder_decoder": (EncoderDecoder, encoder_decoder_outputs),
}
# 0: a sequence that is padding altogether, so that some queries see no key at all
MASKS = {"none": None, "right": [17, 9, 1], "left": [17, 9, 0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_kernels_agree(family, norm, masked, dtype):
    model, outputs = FAMILIES[family]
    mask = None
    if MASKS[masked] is not None:
        mask = (left_padding if masked == "left" else right_padding)(MASKS[masked], 17)
    models = each_kind(model, dtype=dtype, norm=norm, n_kv_heads=2)
    results = []
    for m in models:
        out, loss = outputs(m, mask)
        loss.backward()
        results.append((out, loss, {name: p.grad for name, p in m.named_parameters()}))
    fused, naive, torchs = results
    close = {"rtol": 10 * TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for out, loss, grads in (fused, torchs):
        assert math.isfinite(loss.item())
        torch.testing.assert_close(out, naive[0], **close)
        torch.testing.assert_close(loss, naive[1], **close)
        assert grads.keys() == naive[2].keys()
        for name, grad in grads.items():
            assert grad is not None and grad.isfinite().all(), name
            torch.testing.assert_close(grad, naive[2][name], **close)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("n_kv_heads", [None, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_all_kernels_agree_whatever_the_options(positions, n_kv_heads, bias):
    options = {"positions": positions, "n_kv_heads": n_kv_heads, "bias": bias, "tie_weights": bias}
    fused, naive, torchs = each_kind(LanguageModel, **options)
    x = tokens(2, 48)
    torch.testing.assert_close(fused(x), naive(x), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(torchs(x), naive(x), rtol=2e-5, atol=2e-6)


def test_naive_is_the_formula_of_torch():
    """The naive layer norm and attention against torch's own, so that both cannot be wrong."""
    from fastattn.models.kernels import naive_add_layer_norm, naive_attention

    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind()
    mask = torch.rand(2, 1, 1, 9) > 0.4
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(naive_attention(q, k, v, causal=True), expected)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(naive_attention(q, k, v, bias=mask), expected)
    x, residual = torch.randn(2, 5, 16, dtype=torch.float64).unbind()
    weight, bias = torch.randn(2, 16, dtype=torch.float64).unbind()
    normed, total = naive_add_layer_norm(x, residual, (16,), weight, bias)
    expected = torch.nn.functional.layer_norm(x + residual, (16,), weight, bias)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(total, x + residual)


@pytest.mark.parametrize("norm", NORMS)
def test_a_stack_is_the_textbook_recurrence(norm):
    """The pair (x, branch) that flows through a stack, against the residual formula itself."""
    model = build(Encoder, norm=norm, attention="naive")

    def norm_of(layer_norm, x):
        shape = x.shape[-1:]
        return torch.nn.functional.layer_norm(x, shape, layer_norm.weight, layer_norm.bias)

    ids = tokens(2, 10)
    x = model.embedding(ids, torch.arange(10))
    for layer in model.layers:
        for residual in (layer.self_attention, layer.feed_forward):
            if norm == "pre":
                x = x + residual.sublayer(norm_of(residual.norm, x))
            else:
                x = norm_of(residual.norm, x + residual.sublayer(x))
    if norm == "pre":
        x = norm_of(model.norm, x)
    torch.testing.assert_close(model(ids), x)


def test_bfloat16_autocast_agrees_to_its_accuracy():
    x = tokens(2, 33)
    exact = build(LanguageModel, attention="naive")(x)
    for model in each_kind(LanguageModel):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        assert (logits - exact).abs().mean() < 0.02 * exact.abs().mean()


# ---- what sees what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_token_sees_the_future(kind, norm):
    model = build(LanguageModel, attention=kind, norm=norm)
    x = tokens(1, 24)
    logits = model(x)
    for t in (1, 11, 23):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed)
        torch.testing.assert_close(after[:, :t], logits[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t] - logits[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_tokens_see_both_ways(kind):
    model = build(Encoder, attention=kind)
    x = tokens(1, 24)
    changed = x.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCAB
    moved = (model(changed) - model(x)).abs().amax(-1)[0]
    assert (moved > 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """What stands in the padding does not matter, and a padded row equals itself unpadded."""
    source, target = tokens(2, 15), tokens(2, 9, seed=5)
    mask = right_padding([15, 6], 15)
    model = build(EncoderDecoder, attention=kind)
    logits = model(source, target, mask)
    other = torch.where(mask, source, (source + 7) % VOCAB)
    torch.testing.assert_close(model(other, target, mask), logits, rtol=0, atol=1e-6)
    alone = model(source[1:, :6], target[1:])
    torch.testing.assert_close(alone[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_left_padding_shifts_no_position(positions):
    model = build(LanguageModel, positions=positions)
    x = tokens(1, 8)
    padded = torch.cat((tokens(1, 5, seed=9), x), 1)
    logits = model(padded, left_padding([8], 13))
    torch.testing.assert_close(logits[:, 5:], model(x), rtol=1e-5, atol=1e-5)


def test_sinusoidal_positions():
    table = sinusoidal_positions(50, 6)
    assert table.shape == (50, 6)
    for position, i in itertools.product((0, 1, 49), range(3)):
        angle = position / 10000 ** (2 * i / 6)
        assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
        assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


# ---- shapes, weights, state


def test_shapes():
    assert build(LanguageModel)(tokens(2, 7)).shape == (2, 7, VOCAB)
    assert build(Encoder)(tokens(2, 7)).shape == (2, 7, 32)
    assert build(Decoder)(tokens(2, 7)).shape == (2, 7, 32)
    assert build(EncoderDecoder)(tokens(2, 7), tokens(2, 5)).shape == (2, 5, VOCAB)
    assert build(LanguageModel)(tokens(2, 7).int()).shape == (2, 7, VOCAB)


def test_tied_weights_are_one_table():
    model = build(EncoderDecoder)
    assert model.head.weight is model.decoder.embedding.token.weight
    assert model.head.weight is model.encoder.embedding.token.weight
    loose = build(EncoderDecoder, tie_weights=False)
    assert loose.head.weight is not loose.decoder.embedding.token.weight


def test_initial_weights():
    """As GPT-2: standard deviation 0.02, less by sqrt(branches) where a branch ends; the loss of
    an untrained model is that of a uniform guess."""
    torch.manual_seed(0)
    model = LanguageModel(config(d_model=128, n_layers=3))
    layer = model.decoder.layers[1]
    assert layer.feed_forward.sublayer.input.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for branch in (layer.feed_forward, layer.self_attention):
        std = branch.sublayer.output.weight.std().item()
        assert std == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
        assert branch.sublayer.output.bias.abs().max() == 0
    x = tokens(4, 33)
    assert cross_entropy(model(x[:, :-1]), x[:, 1:]).item() == pytest.approx(
        math.log(VOCAB), abs=0.2
    )


@pytest.mark.parametrize("model", [LanguageModel, EncoderDecoder])
def test_the_prediction_has_a_bias_where_its_weight_is_its_own(model):
    assert model(config()).head.bias is None
    assert model(config(tie_weights=False, bias=False)).head.bias is None
    assert model(config(tie_weights=False)).head.bias.tolist() == [0.0] * VOCAB


@pytest.mark.parametrize("model", [LanguageModel, EncoderDecoder])
def test_state_dict_round_trip(model, tmp_path):
    first, second = build(model, attention="fused"), build(model, seed=1, attention="naive")
    inputs = (tokens(2, 9),) if model is LanguageModel else (tokens(2, 9), tokens(2, 5))
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(second(*inputs), first(*inputs), rtol=1e-5, atol=2e-6)
    if model is LanguageModel:
        assert second.head.weight is second.decoder.embedding.token.weight


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_in_training_only_and_seeded(kind):
    model, x = build(LanguageModel, attention=kind, dropout=0.3), tokens(2, 16)
    draws = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        draws.append(model(x))
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] - draws[2]).abs().max() > 1e-3
    model.eval()
    assert torch.equal(model(x), model(x))
    without = build(LanguageModel, attention=kind)
    torch.testing.assert_close(model(x), without(x))


def test_cross_entropy_ignores_padding():
    logits, targets = torch.randn(2, 5, VOCAB, dtype=torch.float64), tokens(2, 5)
    targets[1, 2:] = IGNORE
    p = logits.log_softmax(-1)
    kept = [p[b, s, targets[b, s]] for b in (0, 1) for s in range(5) if targets[b, s] != IGNORE]
    assert cross_entropy(logits, targets).item() == pytest.approx(-sum(kept).item() / 7)


# ---- generation


def greedy_from_scratch(model, x, n):
    for _ in range(n):
        x = torch.cat((x, model(x)[:, -1:].argmax(-1)), 1)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_cached_greedy_generation_is_the_recomputed_one(kind, norm, positions):
    options = {"attention": kind, "norm": norm, "positions": positions, "n_kv_heads": 2}
    options["tie_weights"] = False  # tied, these weights repeat one token for ever
    model, prompt = build(LanguageModel, **options).eval(), tokens(3, 5)
    expected = greedy_from_scratch(model, prompt, 40)
    assert len(set(expected[0].tolist())) > 5  # not one token over and over
    assert torch.equal(model.generate(prompt, 40, temperature=0), expected)
    assert torch.equal(model.generate(prompt, 40, do_sample=False), expected)
    assert torch.equal(model.generate(prompt, 40, temperature=0, use_cache=False), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_encoder_decoder_generation_is_the_recomputed_one(kind):
    model = build(EncoderDecoder, attention=kind).eval()
    source, mask = tokens(2, 13), right_padding([13, 6], 13)
    expected = torch.full((2, 1), 1)
    for _ in range(30):
        logits = model(source, expected, mask)[:, -1:]
        expected = torch.cat((expected, logits.argmax(-1)), 1)
    for use_cache in (True, False):
        options = {"start_token": 1, "source_mask": mask, "temperature": 0, "use_cache": use_cache}
        assert torch.equal(model.generate(source, 30, **options), expected)
    alone = model.generate(source[1:, :6], 30, start_token=1, temperature=0)
    assert torch.equal(alone[0], expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length(kind):
    model = build(LanguageModel, attention=kind)
    long, short = tokens(1, 9), tokens(1, 4, seed=3)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 5, dtype=torch.int64), short), 1)))
    together = model.generate(batch, 25, mask=left_padding([9, 4], 9), temperature=0)
    assert torch.equal(together[:1], model.generate(long, 25, temperature=0))
    assert torch.equal(together[1:, 5:], model.generate(short, 25, temperature=0))


def test_the_cache_is_allocated_once_and_viewed():
    cache = KVCache(10)
    first, _ = cache.append(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 4, 3))
    keys, values = cache.append(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
    assert first.data_ptr() == keys.data_ptr() == cache.keys.data_ptr()
    assert keys.shape == values.shape == (1, 2, 5, 3)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="holds 10 tokens, got 11"):
        cache.append(torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 6, 3))


def test_stop_tokens():
    model, prompt = build(LanguageModel), tokens(3, 5)
    free = model.generate(prompt, 30, temperature=0)
    stop = free[0, 9].item()
    stopped = model.generate(prompt, 30, temperature=0, stop_tokens=[stop])
    for row, expected in zip(stopped, free, strict=True):
        made = expected[5:].tolist()
        end = 5 + made.index(stop) if stop in made else len(row) - 1
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert set(row[end:].tolist()) == {row[end].item()}
    alone = model.generate(prompt[:1], 30, temperature=0, stop_tokens=[stop])
    first = free[0, 5:].tolist().index(stop)
    assert torch.equal(alone, free[:1, : 5 + first + 1])  # ends early


def draw(logits, **options):
    """The tokens that 2,000 draws choose, with their frequencies."""
    sampler = Sampler(Decoding(seed=0, **options))
    chosen = sampler(torch.tensor(logits).expand(2000, -1))
    return torch.bincount(chosen, minlength=len(logits)) / 2000


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_follows_the_distribution(kind):
    logits = [1.0, 3.0, 2.0, -1.0, 0.0]
    frequencies = []
    for temperature in (1.0, 0.5):
        sampler = Sampler(Decoding(temperature=temperature, seed=0), KERNELS[kind].softmax)
        chosen = sampler(torch.tensor(logits).expand(20000, -1))
        frequency = torch.bincount(chosen, minlength=5) / 20000
        expected = (torch.tensor(logits) / temperature).softmax(-1)
        assert (frequency - expected).abs().max() < 0.015  # four standard errors
        frequencies.append(frequency)
    assert frequencies[1].max() > frequencies[0].max()


def test_top_k_keeps_exactly_k():
    logits = [0.3, 0.1, 0.3, 0.2, 0.0, -0.5]
    for k, support in ((1, 1), (2, 2), (4, 4), (6, 6), (99, 6)):
        assert (draw(logits, top_k=k) > 0).sum() == support
    assert set(draw(logits, top_k=3).nonzero().flatten().tolist()) == {0, 2, 3}
    assert (draw([0.0] * 6, top_k=2) > 0).sum() == 2  # also of ties


def test_top_p_keeps_the_smallest_set_that_holds_p():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()
    for p, support in ((0.01, {1}), (0.49, {1}), (0.51, {1, 2}), (0.74, {1, 2})):
        assert set(draw(logits, top_p=p).nonzero().flatten().tolist()) == support
    assert set(draw(logits, top_p=0.76).nonzero().flatten().tolist()) == {1, 2, 3}
    assert (draw(logits, top_p=1.0) > 0).all()
    kept = draw(logits, top_p=0.7)
    assert kept[1].item() == pytest.approx(2 / 3, abs=0.05)  # the rest is renormalised


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert set(draw(logits, top_k=2, top_p=0.5).nonzero().flatten().tolist()) == {0}
    assert set(draw(logits, top_p=0.5).nonzero().flatten().tolist()) == {0, 1}


def test_tiny_temperatures_are_greedy_and_finite():
    assert draw([0.5, 0.7, 0.6], temperature=1e-30).tolist() == [0, 1, 0]


def test_seeds_reproduce_generation():
    model, prompt = build(LanguageModel), tokens(2, 5)
    first, again, other = (model.generate(prompt, 30, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    model.generate(prompt, 5, seed=1)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)  # a seed leaves torch's own generator alone
    torch.manual_seed(5)
    unseeded = model.generate(prompt, 30)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, 30), unseeded)


def test_generation_leaves_training_as_it_was():
    model, prompt = build(LanguageModel, dropout=0.5), tokens(1, 5)
    assert torch.equal(
        model.generate(prompt, 20, temperature=0), model.generate(prompt, 20, temperature=0)
    )
    assert model.training and model.decoder.layers[0].training
    model.eval().generate(prompt, 1)
    assert not model.training
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_tokens_stream_as_they_are_made():
    model, prompt = build(LanguageModel, tie_weights=False), tokens(3, 5)
    free = model.generate(prompt, 20, seed=0)
    for stops in ([], free[:, 9].tolist()):
        heard = []
        made = model.generate(prompt, 20, seed=0, stop_tokens=stops, stream=heard.append)
        assert torch.equal(torch.stack(heard, 1), made[:, 5:])
    source, heard = tokens(2, 7), []
    made = build(EncoderDecoder).generate(
        source, 9, start_token=1, temperature=0, stream=heard.append
    )
    assert torch.equal(torch.stack(heard, 1), made[:, 1:])


# ---- beam search


def next_log_p(model, prefix, source=None):
    x = torch.tensor([prefix])
    with torch.no_grad():
        logits = model(x) if source is None else model(source, x)
    return logits[0, -1].double().log_softmax(-1).tolist()


def all_continuations(model, prompt, stops, longest, source=None):
    """(log probability, continuation): all that end in a stop token or are as long as allowed."""
    found, open_ones = [], [(0.0, ())]
    for _ in range(longest):
        grown = []
        for log_p, made in open_ones:
            following = next_log_p(model, (*prompt, *made), source)
            grown += [(log_p + more, (*made, token)) for token, more in enumerate(following)]
        found += [one for one in grown if one[1][-1] in stops]
        open_ones = [one for one in grown if one[1][-1] not in stops]
    return found + open_ones


def plain_beam_search(model, prompt, stops, longest, beams, length_penalty, source=None):
    """The same search with lists, one hypothesis at a time, nothing cached."""
    finished, live = [], [(0.0, ())]
    for _ in range(longest):
        grown = []
        for log_p, made in live:
            following = next_log_p(model, (*prompt, *made), source)
            grown += [(log_p + more, (*made, token)) for token, more in enumerate(following)]
        grown.sort(reverse=True)
        finished += [one for one in grown[:beams] if one[1][-1] in stops]
        live = [one for one in grown if one[1][-1] not in stops][:beams]
        if len(finished) >= beams:
            live = []
        if not live:
            break
    return max(finished + live, key=lambda one: one[0] / len(one[1]) ** length_penalty)[1]


def until_stop(made, stops):
    """What was made, without the repeated stop tokens at its end."""
    made = made.tolist()
    ends = [i + 1 for i, token in enumerate(made) if token in stops]
    return tuple(made[: ends[0]] if ends else made)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_beams_enough_for_every_sequence_find_the_best(kind, length_penalty):
    options = {"vocab_size": 4, "attention": kind, "tie_weights": False, "d_model": 16}
    lengths = set()
    for seed in range(4):
        model = build(LanguageModel, seed=seed, **options).eval()
        prompt = torch.tensor([[0, 1], [2, 2]])
        search = {"num_beams": 64, "length_penalty": length_penalty, "stop_tokens": [3]}
        found = model.generate(prompt, 4, **search)
        for row, made in zip(prompt.tolist(), found[:, 2:], strict=True):
            every = all_continuations(model, row, [3], 4)
            best = max(every, key=lambda one: one[0] / len(one[1]) ** length_penalty)
            assert until_stop(made, [3]) == best[1]
            assert sum(math.exp(log_p) for log_p, _ in every) == pytest.approx(1.0)
            lengths.add(len(best[1]))
    assert lengths - {4} or length_penalty  # the probability alone favours short ones


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams, length_penalty", [(2, 1.0), (3, 0.0), (5, 0.6)])
def test_beam_search_is_the_plain_one(beams, length_penalty, use_cache):
    """With two stop tokens, and prompts of unequal length that stop at different times."""
    options = {"vocab_size": 7, "tie_weights": False, "n_kv_heads": 2}
    model = build(LanguageModel, **options).eval()
    prompts = [[1, 2, 3, 4, 1], [5, 2], [3, 3, 1, 4], [4]]
    batch = torch.tensor([[0] * (5 - len(row)) + row for row in prompts])
    mask = left_padding([len(row) for row in prompts], 5)
    search = {"num_beams": beams, "length_penalty": length_penalty, "stop_tokens": [0, 6]}
    found = model.generate(batch, 12, mask=mask, use_cache=use_cache, **search)
    lengths = set()
    for prompt, made in zip(prompts, found[:, 5:], strict=True):
        expected = plain_beam_search(model, prompt, [0, 6], 12, beams, length_penalty)
        assert until_stop(made, [0, 6]) == expected
        lengths.add(len(expected))
        alone = model.generate(torch.tensor([prompt]), 12, use_cache=use_cache, **search)
        assert tuple(alone[0, len(prompt) :].tolist()) == expected
    assert len(lengths) > 1 and found.shape[1] == 5 + max(lengths)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_of_the_encoder_decoder(kind, use_cache):
    model = build(EncoderDecoder, vocab_size=9, attention=kind, tie_weights=False).eval()
    sources = [[1, 2, 3, 4, 5, 6], [7, 2, 1], [8, 8]]
    batch = torch.tensor([row + [0] * (6 - len(row)) for row in sources])
    mask = right_padding([len(row) for row in sources], 6)
    search = {"num_beams": 3, "stop_tokens": [0], "use_cache": use_cache, "start_token": 4}
    found = model.generate(batch, 10, source_mask=mask, **search)
    for source, made in zip(sources, found, strict=True):
        source = torch.tensor([source])
        expected = plain_beam_search(model, (4,), [0], 10, 3, 1.0, source)
        assert made[0] == 4 and until_stop(made[1:], [0]) == expected


def test_one_beam_is_greedy_and_more_are_likelier():
    model, prompt = build(LanguageModel, tie_weights=False).eval(), tokens(4, 5)

    def log_p(whole):
        steps = model(whole[:, :-1]).log_softmax(-1)
        return steps.gather(-1, whole[:, 1:, None])[:, 4:].sum((1, 2))

    greedy = model.generate(prompt, 12, do_sample=False)
    assert torch.equal(model.generate(prompt, 12, do_sample=False, num_beams=1), greedy)
    searched = model.generate(prompt, 12, num_beams=4)
    assert (log_p(searched) > log_p(greedy) - 1e-4).all()
    assert (log_p(searched) > log_p(greedy) + 1e-2).any()
    assert torch.equal(model.generate(prompt, 0, num_beams=4), prompt)


def test_a_vocabulary_of_stop_tokens_stops_at_once():
    model = build(LanguageModel, vocab_size=3, tie_weights=False)
    found = model.generate(torch.tensor([[0, 1]]), 5, num_beams=4, stop_tokens=[0, 1, 2])
    assert found.shape == (1, 3)
    best = model(torch.tensor([[0, 1]]))[0, -1].argmax().item()
    assert found[0, 2].item() == best


# ---- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"attention": "flash"},
            r"attention must be one of \('fused', 'naive', 'torch'\), got 'flash'",
        ),
        ({"norm": "middle"}, "norm must be one of"),
        ({"positions": "rotary"}, "positions must be one of"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"n_layers": 1.5}, "n_layers must be a positive integer, got 1.5"),
        ({"d_ff": 0}, "d_ff must be a positive integer, got 0"),
        ({"n_kv_heads": 0}, "n_kv_heads must be a positive integer, got 0"),
        ({"d_model": 30}, "d_model must be a multiple of n_heads, got 30 and 4"),
        ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads, got 4 and 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"d_model": 3, "n_heads": 1, "positions": "sinusoidal"}, "even d_model, got 3"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().d_model = 64


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ((tokens(1, 49),), ValueError, "49 tokens is longer than max_len 48"),
        ((tokens(7),), ValueError, r"tokens must be \(batch, length\).*got shape \(7,\)"),
        ((tokens(1, 0),), ValueError, "length > 0"),
        ((torch.zeros(1, 4),), TypeError, "tokens must be int64 or int32, got torch.float32"),
        ((tokens(2, 4), torch.ones(2, 4)), TypeError, "mask must be a boolean tensor"),
        ((tokens(2, 4), torch.ones(2, 3).bool()), ValueError, r"mask must be \(2, 4\)"),
        ((torch.full((1, 4), VOCAB),), IndexError, "out of range"),
    ],
)
def test_bad_tokens(inputs, error, message):
    with pytest.raises(error, match=message):
        build(LanguageModel)(*inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"num_beams": 0}, "num_beams must be an integer of at least 1, got 0"),
        ({"length_penalty": math.inf}, "length_penalty must be a finite number, got inf"),
        ({"num_beams": 2, "top_p": 0.5}, "draws nothing: num_beams > 1 with top_p"),
        ({"num_beams": 2, "stream": print}, "no stream"),
        ({"max_new_tokens": 45}, "prompt of 4 tokens and max_new_tokens=45.*max_len 48"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"prompt": torch.full((1, 4), VOCAB)}, r"prompt must be in \[0, 53\), got ids from 53"),
        ({"prompt": torch.tensor([[0, -1]])}, r"got ids from -1 to 0"),
        ({"prompt": tokens(1, 0)}, "length > 0"),
        ({"mask": right_padding([2], 4)}, "padded on the left"),
        ({"mask": right_padding([3], 3)}, r"mask must be \(1, 4\)"),
    ],
)
def test_bad_generation(options, message):
    options = {"prompt": tokens(1, 4), "max_new_tokens": 2, **options}
    with pytest.raises(ValueError, match=message):
        build(LanguageModel).generate(**options)


def test_bad_encoder_decoder_input():
    model = build(EncoderDecoder)
    source, target = tokens(2, 6), tokens(2, 4)
    with pytest.raises(ValueError, match=r"mask must be \(2, 6\)"):
        model(source, target, torch.ones(2, 5).bool())
    with pytest.raises(ValueError, match=r"memory must be.*batch 3"):
        model(source, tokens(3, 4))
    with pytest.raises(ValueError, match=r"start_token must be in \[0, 53\)"):
        model.generate(source, 3, start_token=VOCAB)
    with pytest.raises(ValueError, match=r"source must be in \[0, 53\)"):
        model.generate(source + VOCAB, 3, start_token=0)
    with pytest.raises(ValueError, match="needs memory"):
        model.decoder(target)
    with pytest.raises(ValueError, match="no cross-attention"):
        build(Decoder)(target, memory=torch.zeros(2, 6, 32))
    with pytest.raises(ValueError, match=r"targets must be \(2, 4\)"):
        cross_entropy(model(source, target), target[:, 1:])
