"""BERT and the classifier: every set of kernels agrees, padding changes nothing, bad input."""

import math

import pytest
import torch
from small_transformers import TOLERANCE, VOCAB, build, config, right_padding, tokens

from fastattn.models import Encoder, MaskedLanguageModel, SequenceClassifier, mean_pool
from fastattn.models.transformer import IGNORE, KERNELS

LENGTHS = [17, 9, 3]
MASK = right_padding(LENGTHS, 17)
SEGMENTS = (torch.arange(17) >= torch.tensor([[8], [4], [2]])).long()
TARGETS = tokens(3, 17).masked_fill(~MASK | (tokens(3, 17, seed=5) % 4 > 0), IGNORE)
FOLLOWS = torch.tensor([True, False, True])


def bert(seed=0, **fields):
    return build(MaskedLanguageModel, seed, **{"segments": 2, **fields})


def classifier(seed=0, classes=5, **fields):
    return build(lambda c: SequenceClassifier(c, classes), seed, **{"segments": 2, **fields})


def pretraining_loss(model):
    masked, pairs, logits = model.losses(tokens(3, 17), TARGETS, FOLLOWS, MASK, SEGMENTS)
    return logits, masked + pairs


def classification_loss(model):
    logits = model(tokens(3, 17), MASK, SEGMENTS)
    return (logits,), torch.nn.functional.cross_entropy(logits, torch.tensor([4, 0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", [kind for kind in KERNELS if kind != "naive"])
@pytest.mark.parametrize(
    "make, outputs", [(bert, pretraining_loss), (classifier, classification_loss)]
)
def test_every_set_of_kernels_agrees_with_naive(make, outputs, kind, norm, dtype):
    results = []
    for attention in (kind, "naive"):
        model = make(attention=attention, norm=norm, dtype=dtype)
        out, loss = outputs(model)
        loss.backward()
        results.append((*out, loss, *(p.grad for p in model.parameters())))
    assert math.isfinite(loss.item())
    for one, other in zip(*results, strict=True):
        assert one is not None and one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=10 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KERNELS)
def test_padding_changes_nothing(kind):
    x = tokens(3, 17)
    model, classify = bert(attention=kind), classifier(attention=kind)
    whole, classes = model(x, MASK, SEGMENTS), classify(x, MASK, SEGMENTS)
    for row, length in enumerate(LENGTHS):
        alone = x[row : row + 1, :length], None, SEGMENTS[row : row + 1, :length]
        one = model(*alone)
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(whole.tokens[row, :length], one.tokens[0], **close)
        torch.testing.assert_close(whole.follows[row], one.follows[0], **close)
        torch.testing.assert_close(classes[row], classify(*alone)[0], **close)
    changed = x.masked_fill(~MASK, 7)
    torch.testing.assert_close(model(changed, MASK, SEGMENTS).follows, whole.follows)
    torch.testing.assert_close(classify(changed, MASK, SEGMENTS), classes)


def test_every_token_sees_both_sides():
    model, x = bert(), tokens(1, 12)
    logits = model(x)
    for changed_at, seen_from in ((0, 11), (11, 0)):
        changed = x.clone()
        changed[0, changed_at] = (changed[0, changed_at] + 1) % VOCAB
        difference = (model(changed).tokens - logits.tokens)[0, seen_from]
        assert difference.abs().max() > 1e-4


def test_segments_count_and_are_0_by_default():
    model, x = bert(), tokens(3, 17)
    default, first = model(x), model(x, segments=torch.zeros_like(x))
    assert torch.equal(default.tokens, first.tokens)
    assert (model(x, segments=SEGMENTS).tokens - first.tokens).abs().max() > 1e-2
    assert build(Encoder).embedding.segment is None


def test_only_the_predicted_positions():
    model, x = bert(), tokens(3, 17)
    predicted = TARGETS != IGNORE
    every, some = model(x, MASK, SEGMENTS), model(x, MASK, SEGMENTS, predicted)
    assert some.tokens.shape == (int(predicted.sum()), VOCAB)
    torch.testing.assert_close(some.tokens, every.tokens[predicted])
    assert torch.equal(some.follows, every.follows)


def test_losses_are_the_formulas():
    model = bert(dtype=torch.float64)
    masked, pairs, _ = model.losses(tokens(3, 17), TARGETS, FOLLOWS, MASK, SEGMENTS)
    logits = model(tokens(3, 17), MASK, SEGMENTS)
    log_p = logits.tokens.log_softmax(-1)
    told = [log_p[b, s, TARGETS[b, s]] for b, s in (TARGETS != IGNORE).nonzero().tolist()]
    torch.testing.assert_close(masked, -torch.stack(told).mean())
    p = logits.follows.sigmoid()
    expected = -torch.where(FOLLOWS, p, 1 - p).log().mean()
    torch.testing.assert_close(pairs, expected)
    nothing, _, _ = model.losses(tokens(3, 17), torch.full((3, 17), IGNORE), FOLLOWS)
    assert nothing.item() == 0.0
    nothing.backward()


def test_the_pair_head_is_its_formula():
    model = bert(dtype=torch.float64)
    x, head = tokens(3, 17), model.pair_head
    hidden = model.encoder(x, MASK, SEGMENTS)
    for row, logit in enumerate(model(x, MASK, SEGMENTS).follows):
        a, b = (hidden[row][MASK[row] & (SEGMENTS[row] == i)].mean(0) for i in (0, 1))
        features = torch.cat((a, b, (a - b).abs(), a * b))
        expected = head.output.weight @ (head.hidden.weight @ features + head.hidden.bias).tanh()
        torch.testing.assert_close(logit[None], expected + head.output.bias)


def test_sinusoidal_tokens_start_as_large_as_their_positions():
    torch.manual_seed(0)
    embedding = MaskedLanguageModel(
        config(vocab_size=999, segments=2, positions="sinusoidal")
    ).encoder.embedding
    token = embedding.scale * embedding.token.weight.detach()
    amplitude = embedding.table.square().mean().sqrt().item()
    assert token.std().item() == pytest.approx(amplitude, rel=0.02)


def test_mean_pool():
    hidden = torch.randn(3, 17, 4, dtype=torch.float64)
    expected = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(mean_pool(hidden, MASK), expected)
    torch.testing.assert_close(mean_pool(hidden), hidden.mean(1))
    assert torch.equal(mean_pool(hidden, torch.zeros(3, 17).bool()), torch.zeros(3, 4).double())


def test_a_classifier_takes_the_encoder_and_keeps_its_head():
    model, classify = bert(seed=0), classifier(seed=1)
    head = classify.head.weight.clone()
    classify.load_encoder(model.state_dict())
    x = tokens(3, 17)
    hidden = model.encoder(x, MASK, SEGMENTS)
    assert torch.equal(classify.encoder(x, MASK, SEGMENTS), hidden)
    assert torch.equal(classify.head.weight, head)


def test_weights_of_another_configuration_are_refused_whole():
    classify = classifier()
    before = {name: p.clone() for name, p in classify.state_dict().items()}
    with pytest.raises(ValueError, match=r"embedding.token.weight is \(60, 32\) there, \(53, 32\)"):
        classify.load_encoder(bert(seed=1, vocab_size=60).state_dict())
    with pytest.raises(ValueError, match=r"another configuration.* is None there"):
        classify.load_encoder(classifier(seed=1, segments=0).state_dict())
    with pytest.raises(ValueError, match="another configuration"):
        classify.load_encoder({})
    assert all(torch.equal(p, before[name]) for name, p in classify.state_dict().items())


def test_tied_weights_are_one_table():
    model = bert()
    assert model.token_head.output.weight is model.encoder.embedding.token.weight
    apart = bert(tie_weights=False)
    assert apart.token_head.output.weight is not apart.encoder.embedding.token.weight


def test_bfloat16_autocast_agrees_to_its_accuracy():
    exact, _ = pretraining_loss(bert(attention="naive"))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = pretraining_loss(bert())
    assert loss.dtype == torch.float32
    assert (logits.tokens - exact.tokens).abs().mean() < 0.02 * exact.tokens.abs().mean()


@pytest.mark.parametrize("segments", [-1, 1.5, True, None])
def test_bad_segments_of_a_configuration(segments):
    with pytest.raises(ValueError, match="segments must be an integer of at least 0, got"):
        config(segments=segments)


def test_bad_input():
    x = tokens(3, 17)
    with pytest.raises(ValueError, match="segments must be at least 2 for pairs, got 1"):
        bert(segments=1)
    with pytest.raises(ValueError, match="classes must be an integer of at least 2, got 1"):
        classifier(classes=1)
    with pytest.raises(ValueError, match="the configuration has no segments, but got segments"):
        classifier(segments=0)(x, segments=SEGMENTS)
    with pytest.raises(ValueError, match=r"segments must be \(3, 17\), got shape \(3, 16\)"):
        bert()(x, segments=SEGMENTS[:, 1:])
    with pytest.raises(TypeError, match=r"segments must be an int64 or int32.* torch\.bool"):
        bert()(x, segments=SEGMENTS.bool())
    with pytest.raises(IndexError, match="out of range"):
        bert()(x, segments=SEGMENTS + 1)
    with pytest.raises(TypeError, match="predicted must be a boolean tensor"):
        bert()(x, predicted=SEGMENTS)
    with pytest.raises(ValueError, match=r"targets must be \(3, 17\), got shape \(3, 16\)"):
        bert().losses(x, TARGETS[:, 1:], FOLLOWS)
    with pytest.raises(ValueError, match=r"follows must be boolean and \(3,\), got torch.int64"):
        bert().losses(x, TARGETS, FOLLOWS.long())
    with pytest.raises(ValueError, match=r"mask must be \(3, 17\)"):
        mean_pool(torch.zeros(3, 17, 4), MASK[:, 1:])
