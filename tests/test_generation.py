"""The reference Transformer goes on: greedy, by sampling, by beam search, with a cache, as a stream."""

import math

import pytest
import torch
from small_transformers import KINDS, NORMS, build, left_padding, right_padding, tokens

from fastattn.models import EncoderDecoder, LanguageModel
from fastattn.models.generation import Decoding, Sampler
from fastattn.models.kernels import KERNELS
from fastattn.models.transformer import KVCache

# ---- token by token


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
