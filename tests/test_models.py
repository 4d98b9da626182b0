"""The reference Transformer: fused equals naive, causality, masks, bad input."""

import dataclasses
import itertools
import math

import pytest
import torch
from small_transformers import (
    KINDS,
    NORMS,
    TOLERANCE,
    VOCAB,
    build,
    config,
    each_kind,
    left_padding,
    right_padding,
    tokens,
)

from fastattn.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    LanguageModel,
    cross_entropy,
)
from fastattn.models.transformer import IGNORE, sinusoidal_positions

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
