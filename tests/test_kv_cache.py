"""The KV cache of a patched Hugging Face model beside transformers' own."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers.cache_utils import (  # noqa: E402
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
)

from fastattn.integrations import kv_cache  # noqa: E402

transformers.logging.set_verbosity_error()
HEADS, DIM, VOCAB = 2, 4, 50
GPT2 = transformers.GPT2Config(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    bos_token_id=0,
    eos_token_id=2,
)
MISTRAL = transformers.MistralConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    sliding_window=5,
)


def build(config, patched):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if patched:
        fastattn.patch(model)
    return model


def states(tokens, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))


def appending(sliding):
    return (
        kv_cache.AppendingSlidingWindowLayer(sliding_window=7)
        if sliding
        else kv_cache.AppendingLayer()
    )


def steps(tokens, layer):
    for seed in range(tokens):
        layer.update(*states(1, seed=seed))


STEPS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 70)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("update with gradients"), st.integers(1, 3)),
    st.tuples(st.just("update in inference mode"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(1, 4)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("select"), st.just(1)),
    st.tuples(st.just("fork"), st.just(0)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("pickle"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


def take(layer, step, number, seed):
    """One step of a layer's life; what it hands out."""
    batch = 2 if layer.keys is None or layer.keys.dim() < 4 else len(layer.keys)
    if step.startswith("update"):
        new = states(number, batch, seed)
        if step == "update with gradients":
            with torch.enable_grad():
                return layer.update(*(x.requires_grad_() for x in new))
        if step == "update in inference mode":
            with torch.inference_mode():
                return layer.update(*new)
        return layer.update(*new)
    if layer.get_seq_length() <= 4:
        return ()
    if step == "crop":
        layer.crop(-number)
    elif step == "reorder":
        layer.reorder_cache(torch.tensor([number % batch] * batch))
    elif step == "repeat" and batch < 8:
        layer.batch_repeat_interleave(number)
    elif step == "select":
        layer.batch_select_indices(torch.arange(number))
    elif step == "reset":
        layer.reset()
    return (layer.keys, layer.values) if layer.keys is not None else ()


@pytest.mark.parametrize("sliding", [False, True])
@settings(max_examples=60, deadline=None)
@given(life=st.lists(STEPS, min_size=1, max_size=14))
@torch.no_grad()
def test_a_layers_life(sliding, life):
    """Always what transformers' own layer holds; and what was handed out once stays as it was,
    whatever becomes of the layer, of a fork of it and of copies."""
    mine, theirs = (
        appending(sliding),
        DynamicSlidingWindowLayer(sliding_window=7) if sliding else DynamicLayer(),
    )
    handed_out, forks = [], []
    for seed, (step, number) in enumerate(life):
        if step == "crop" and sliding:
            continue
        if step == "fork":
            forks.append((copy.copy(mine), copy.copy(theirs)))
        elif step in ("copy", "pickle") and not (mine.keys is not None and mine.keys.requires_grad):
            mine = copy.deepcopy(mine) if step == "copy" else pickle.loads(pickle.dumps(mine))
        for ours, other in [*forks, (mine, theirs)]:
            got, expected = take(ours, step, number, seed), take(other, step, number, seed)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            handed_out += [(x, x.clone()) for x in got]
            assert ours.get_seq_length() == other.get_seq_length()
            assert ours.get_mask_sizes(1) == other.get_mask_sizes(1)
    assert all(torch.equal(x, then) for x, then in handed_out)


@pytest.mark.parametrize("sliding", [False, True])
@torch.no_grad()
def test_a_token_copies_itself_only(sliding):
    layer = appending(sliding)
    layer.update(*states(100))
    places = set()
    for seed in range(1000):
        keys, values = layer.update(*states(1, seed=seed))
        places.add((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
        held, room = layer.keys.shape[2], keys.untyped_storage().nbytes() // (2 * HEADS * DIM * 4)
        assert room <= max(held + 1, 7) * 1.125 + 2 + kv_cache._SPARE
    assert len(places) < (1000 // kv_cache._SPARE + 3 if sliding else 20)


@torch.no_grad()
def test_room_is_not_shared_with_other_shapes_and_dtypes():
    """What cannot be appended is transformers' to join, with its results and errors."""
    for more in (states(1)[0].double(), states(1, batch=3)[0], states(1)[0][..., :2]):
        results = []
        for layer in (appending(False), DynamicLayer()):
            steps(3, layer)
            try:
                results.append(layer.update(more, more)[0])
            except RuntimeError as error:
                results.append(str(error))
        assert type(results[0]) is type(results[1])
        if isinstance(results[0], torch.Tensor):
            assert torch.equal(*results)
        else:
            assert results[0] == results[1]


@torch.no_grad()
def test_a_part_of_the_batch_that_lies_where_the_whole_did():
    layer, plain = appending(False), DynamicLayer()
    for one in (layer, plain):
        steps(3, one)
        one.keys, one.values = one.keys[:1], one.values[:1]
    before = layer.keys.clone()
    for got, expected in zip(layer.update(*states(1, 1)), plain.update(*states(1, 1)), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(layer.keys[:, :, :3], before)


def test_out_of_inference_mode():
    layer = appending(False)
    with torch.inference_mode():
        steps(3, layer)
    with torch.no_grad():
        assert layer.update(*states(1))[0].shape[2] == 4


@pytest.mark.parametrize("config", [GPT2, MISTRAL], ids=["gpt2", "mistral"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "prompt lookup", "samples"],
)  # fmt: skip
def test_text_is_that_of_the_plain_cache(config, options):
    tokens = torch.arange(3, 15).repeat(1 if "prompt_lookup_num_tokens" in options else 2, 2)
    texts = []
    for patched in (True, False):
        torch.manual_seed(1)
        out = build(config, patched).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=100,
            min_new_tokens=100,
            pad_token_id=1,
            return_dict_in_generate=True,
            **({"do_sample": False} | options),
        )
        texts.append(out.sequences)
        cache = getattr(out, "cache", None) or out.past_key_values
        kinds = {type(layer).__name__ for layer in cache.layers}
        assert all(kind.startswith("Appending") for kind in kinds) is patched
    assert torch.equal(*texts)


def test_steps_by_hand_and_gradients_from_a_cache():
    """A cache that the model made itself, one that the caller made, and a prefix that is trained
    on: there the layers do as transformers' own, and the prefix stays whole."""
    prompt, rest = torch.arange(20)[None], torch.arange(20, 30)[None]
    results = []
    for patched in (True, False):
        model = build(GPT2, patched)
        for cache in (None, DynamicCache(), DynamicCache(config=GPT2)):
            with torch.no_grad():
                cache = model(prompt, past_key_values=cache, use_cache=True).past_key_values
                logits = [model(rest[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
                prefix = copy.deepcopy(cache)
            loss = model(rest, past_key_values=cache, labels=rest).loss
            loss.backward()
            with torch.no_grad():
                again = model(rest, past_key_values=prefix).logits
            results.append([*logits, loss, again, *(p.grad for p in model.parameters())])
            model.zero_grad()
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_and_a_cache_that_was_appended_to():
    """In one graph, by transformers' own code, without a warning of the compiler's; eager steps go
    on from there."""
    tokens = torch.arange(12)[None]
    results = []
    for patched in (True, False):
        torch._dynamo.reset()
        model, cache = build(GPT2, patched), DynamicCache(config=GPT2)
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        results.append([])
        for run, token in [(model, 0), (model, 3), (compiled, 5), (compiled, 6), (model, 7)]:
            seen = tokens if token == 0 else tokens[:, token : token + 1]
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Dynamo detected a call")
                results[-1].append(run(seen, past_key_values=cache).logits)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_left_alone():
    offloaded, static = DynamicCache(), StaticCache(GPT2, max_cache_len=8)
    offloaded.offloading = True
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model = build(GPT2, True)
    for cache in (offloaded, static, both):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                kv_cache.before_forward(model, (), {"cache": cache, "use_cache": True})
            appends = both.self_attention_cache.layer_class_to_replicate is kv_cache.AppendingLayer
            assert appends is (cache is both and not grad)
    assert offloaded.layer_class_to_replicate is DynamicLayer
    assert both.cross_attention_cache.layer_class_to_replicate is DynamicLayer
    assert not any(type(layer).__module__ == kv_cache.__name__ for layer in static.layers)


def test_the_hook_comes_and_goes():
    model = build(GPT2, False)
    kept = model.register_forward_pre_hook(lambda *_: None)
    report = fastattn.patch(model)
    assert report.replaced["cache"] == "DynamicCache, appended to in place"
    assert not fastattn.patch(model).replaced and len(model._forward_pre_hooks) == 2
    for copied in (copy.deepcopy(model), model):
        assert fastattn.unpatch(copied).replaced["cache"] == "transformers' own"
        assert len(copied._forward_pre_hooks) == 1
        assert not copied._forward_pre_hooks_with_kwargs
    assert kept.id in model._forward_pre_hooks
    fastattn.patch(model)  # by itself, then inside another: gone from there too
    outer = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(
            transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        ),
        decoder=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**(GPT2.to_dict() | {"add_cross_attention": True}))
        ),
    )
    fastattn.patch(outer.decoder)
    assert fastattn.unpatch(outer).replaced["decoder.cache"] == "transformers' own"
    assert not outer.decoder._forward_pre_hooks
    fastattn.unpatch(model)
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert "cache" not in fastattn.patch(transformers.ViTModel(vit)).replaced
