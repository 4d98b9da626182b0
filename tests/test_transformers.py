"""Hugging Face models with attn_implementation="fastattn", and patched, beside eager ones."""

import copy
import pickle
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
from fastattn import library, rms_modules

transformers = pytest.importorskip("transformers", minversion="5")

from fastattn.integrations import transformers as integration  # noqa: E402

transformers.logging.set_verbosity_error()
VOCAB = 50
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
GQA = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL | NO_DROPOUT),
    "bart": ("BartForConditionalGeneration", "BartConfig", {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "forced_eos_token_id": None, "decoder_start_token_id": 0}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA | {"sliding_window": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GQA | {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GQA | {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "vit": ("ViTForImageClassification", "ViTConfig", {key: SMALL[key] for key in list(SMALL)[:4]} | NO_DROPOUT | {"image_size": 16, "patch_size": 4, "num_labels": 3}),
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)
ENCODER_DECODER = ("bart", "t5")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def eager(family):
    model, config, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, model)(config).eval()
    with torch.no_grad():  # sinks and position biases are made without memory of their own
        for name, p in model.named_parameters():
            if "sinks" in name or "relative_attention_bias" in name:
                p.normal_()
    return model


def inputs(family, pad=None):
    """(keywords, which positions count)"""
    g = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}, None
    tokens = torch.randint(3, VOCAB, (2, 9), generator=g)
    mask = torch.ones(2, 9, dtype=torch.long)
    if pad is not None:
        mask[1, slice(3) if pad == "left" else slice(-3, None)] = 0
    keywords = {"input_ids": tokens, "attention_mask": mask}
    if family in ENCODER_DECODER:
        return keywords | {"decoder_input_ids": tokens}, None
    return keywords, mask.bool()


def same(family, mine, theirs, pad=None):
    keywords, counts = inputs(family, pad)
    results = []
    for model in (mine, theirs):
        logits = model(**keywords).logits
        logits = logits if counts is None else logits[counts]
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(logits.square().mean(), parameters.values(), allow_unused=True)
        results.append((logits.detach(), dict(zip(parameters, grads, strict=True))))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    for name, grad in results[1][1].items():
        got = results[0][1][name]
        assert (grad is None) == (got is None), name
        if grad is not None:
            torch.testing.assert_close(got, grad, **CLOSE)


@pytest.fixture
def attention_calls(monkeypatch):
    ran, original = [], library.attention_forward.run
    monkeypatch.setattr(
        library.attention_forward, "run", lambda *a, **k: ran.append(1) or original(*a, **k)
    )
    return ran


@families
@pytest.mark.parametrize("pad", [None, "left", "right"])
def test_logits_and_gradients(family, pad, attention_calls):
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    integration.register()
    mine.set_attn_implementation("fastattn")
    if family == "vit" and pad is not None:
        pytest.skip("pictures are not padded")
    same(family, mine, theirs, pad)
    assert len(attention_calls) >= 2


@families
@pytest.mark.parametrize("pad", [None, "left"])
def test_generation_token_by_token(family, pad):
    if family in ("vit", "bert"):
        pytest.skip("it does not generate")
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    integration.register()
    mine.set_attn_implementation("fastattn")
    keywords, _ = inputs(family, pad)
    keywords.pop("decoder_input_ids", None)
    texts = [
        m.generate(**keywords, max_new_tokens=12, do_sample=False, pad_token_id=1)
        for m in (mine, theirs)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape[1] > (2 if family in ENCODER_DECODER else 9)


@families
def test_attentions_that_are_asked_for(family):
    """The weights are computed, as eager's."""
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    fastattn.patch(mine)
    keywords, counts = inputs(family, None if family in ENCODER_DECODER else "right")
    outs = [model(**keywords, output_attentions=True) for model in (mine, theirs)]
    for name in ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions"):
        got, expected = (getattr(out, name, None) for out in outs)
        assert (got is None) == (expected is None)
        for a, b in zip(got or (), expected or (), strict=True):
            seen = slice(None) if counts is None else counts[:, None, :, None].expand_as(b)
            torch.testing.assert_close(a[seen], b[seen], **CLOSE)


def test_a_configuration_that_asks_for_attentions_stays_eager_and_can_be_saved(tmp_path):
    model = eager("llama")
    model.config.output_attentions = True
    report = fastattn.patch(model)
    assert "output_attentions" in report.left["config"] and "model.norm" in report.replaced
    assert len(model(torch.arange(5)[None]).attentions) == 2
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()


@families
def test_patched(family, attention_calls):
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    before = [type(module) for module in mine.modules()]
    report = fastattn.patch(mine)
    assert report.replaced["config"] == 'attn_implementation="fastattn"'
    assert set(report.left) <= {""}  # a whole model's own softmax
    assert mine.config._attn_implementation == "fastattn"
    norms = [name for name, m in mine.named_modules() if "norm" in type(m).__name__.lower()]
    assert norms and all(name in report.replaced for name in norms)
    same(family, mine, theirs)
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        keywords, _ = inputs(family)
        torch.testing.assert_close(copied(**keywords).logits, mine(**keywords).logits)
    assert attention_calls
    assert not fastattn.patch(mine).replaced
    fastattn.unpatch(mine)
    assert [type(module) for module in mine.modules()] == before
    assert mine.config._attn_implementation == "eager"
    keywords, _ = inputs(family)
    assert torch.equal(mine(**keywords).logits, theirs(**keywords).logits)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "gemma2"])
def test_patched_and_compiled_whole(family):
    torch._dynamo.reset()
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    fastattn.patch(mine)
    keywords, _ = inputs(family)
    keywords.pop("attention_mask")
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**keywords).logits, theirs(**keywords).logits, **CLOSE)


@families
def test_twenty_steps_have_equal_losses(family):
    losses = []
    for patched in (False, True):
        model = eager(family).train()
        if patched:
            fastattn.patch(model)
        keywords, _ = inputs(family)
        labels = torch.tensor([0, 2]) if family == "vit" else keywords["input_ids"]
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses.append([])
        for _ in range(20):
            loss = model(**keywords, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("family", ["gpt2", "t5", "gemma2"])
@pytest.mark.parametrize("way", ["beam", "static cache", "no cache", "weights asked for"])
def test_other_ways_to_generate(family, way):
    options = {
        "beam": {"num_beams": 3},
        "static cache": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "weights asked for": {"output_attentions": True, "return_dict_in_generate": True},
    }[way]
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    fastattn.patch(mine)
    keywords, _ = inputs(family, "left")
    keywords.pop("decoder_input_ids", None)
    outs = [
        m.generate(**keywords, max_new_tokens=8, do_sample=False, pad_token_id=1, **options)
        for m in (mine, theirs)
    ]
    if way == "weights asked for":
        weights = [getattr(out, "attentions", None) or out.decoder_attentions for out in outs]
        counts = inputs(family, "left")[1]  # of the prompt; a padding token's weights are its own
        for ours, eagers in zip(*weights, strict=True):
            for a, b in zip(ours, eagers, strict=True):
                if counts is not None and a.shape[2] == counts.shape[1]:
                    seen = counts[:, None, :, None].expand_as(b)
                    a, b = a[seen], b[seen]
                torch.testing.assert_close(a, b, **CLOSE)
        outs = [out.sequences for out in outs]
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_patched_and_exported(family):
    model = eager(family)
    model.config.use_cache = False  # a cache is no tensor
    fastattn.patch(model)
    keywords, _ = inputs(family, "right")
    lengths = {name: {1: torch.export.Dim.DYNAMIC} for name in keywords}
    program = torch.export.export(model, (), keywords, dynamic_shapes=lengths)
    used = [str(node.target) for node in program.graph.nodes if "fastattn" in str(node.target)]
    assert sum("attention_forward" in name for name in used) == 2
    assert sum("layer_norm_forward" in name for name in used) >= 5
    longer = {name: torch.cat([x, x[:, :4]], 1) for name, x in keywords.items()}
    for given in (keywords, longer):
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits, **CLOSE)


@families
def test_gradient_checkpointing(family):
    theirs = eager(family)
    mine = copy.deepcopy(theirs)
    fastattn.patch(mine)
    keywords, _ = inputs(family)
    labels = torch.tensor([0, 2]) if family == "vit" else keywords["input_ids"]
    grads = []
    for model in (mine, theirs):
        model.train().gradient_checkpointing_enable()
        model(**keywords, labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_mask_of_the_wrong_shape(family):
    model = eager(family)
    fastattn.patch(model)
    keywords, _ = inputs(family)
    message = r"attention_mask: expected a shape that broadcasts .* got \(2, 1, 9, 4\)"
    with pytest.raises(ValueError, match=message):
        model(**{**keywords, "attention_mask": torch.zeros(2, 1, 9, 4)})


OWN = {
    "NllbMoe": {"num_experts": 2, "expert_capacity": 20},
    "PegasusX": {"block_size": 4, "num_global_tokens": 4},
    "BigBirdPegasus": {"block_size": 4},
}


@pytest.mark.parametrize("name", OWN)
def test_models_that_are_made_for_eager_masks(name):
    """Decoders do not say that they are causal, or encoders add the mask to scores themselves."""
    config = getattr(transformers, f"{name}Config")(**(FAMILIES["bart"][2] | OWN[name]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(3, VOCAB, (2, 7))
    keywords = {"input_ids": ids, "attention_mask": ids.ne(ids[0, 0]).long()}
    keywords["decoder_input_ids"] = ids.flip(1)
    expected = model(**keywords).logits
    report = fastattn.patch(model)
    assert 'attn_implementation="fastattn"' in report.replaced["config"]
    torch.testing.assert_close(model(**keywords).logits, expected, **CLOSE)


def test_what_only_eager_attention_knows(monkeypatch):
    def eager_attention_forward(module, query, key, value, attention_mask, sinks=None, **keywords):
        return value, None

    model = eager("llama")
    attention = model.model.layers[0].self_attn
    code = sys.modules[type(attention).__module__]
    monkeypatch.setattr(code, "eager_attention_forward", eager_attention_forward)
    integration.unknown_arguments.cache_clear()
    try:
        report = fastattn.patch(model)
        assert "its attention takes sinks" in report.left["config"]
        assert model.config._attn_implementation == "eager"
        x = torch.ones(1, 4, 3, 8)
        with pytest.raises(TypeError, match=r"sinks: expected None, got Tensor; only the eager"):
            integration.attention_forward(attention, x, x, x, None, sinks=torch.zeros(4))
        integration.attention_forward(attention, x, x, x, None, sinks=None)
    finally:
        integration.unknown_arguments.cache_clear()


def test_a_model_inside_another():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.norm = eager("llama"), nn.LayerNorm(VOCAB)

    model = Wrapper()
    report = fastattn.patch(model)
    assert report.replaced["backbone.config"] and report.replaced["norm"]
    assert model.backbone.config._attn_implementation == "fastattn"
    fastattn.unpatch(model)
    assert model.backbone.config._attn_implementation == "eager"


def test_parts_get_their_own_attention_back():
    model = eager("t5")
    assert model.encoder.config is not model.config
    model.encoder.config._attn_implementation = "sdpa"
    fastattn.patch(model)
    assert model.encoder.config._attn_implementation == "fastattn"
    fastattn.unpatch(model)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "eager"


def test_the_model_is_not_left_half_patched(monkeypatch):
    model = eager("llama")
    before = [type(module) for module in model.modules()]

    def fails(self, *args, **keywords):
        raise RuntimeError("no")

    monkeypatch.setattr(type(model), "set_attn_implementation", fails)
    with pytest.raises(RuntimeError, match="no"):
        fastattn.patch(model)
    monkeypatch.undo()
    assert [type(module) for module in model.modules()] == before
    assert model.config._attn_implementation == "eager"


class Rms(nn.Module):
    def __init__(self, mean=False, offset=0.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5
        self.mean, self.offset = mean, offset

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.mean else x
        return (
            (self.offset + self.weight)
            * x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        )


def test_rms_norms_are_told_by_what_they_compute():
    assert rms_modules.recognise(Rms()) == ("eps", 0.0)
    assert rms_modules.recognise(Rms(offset=1.0)) == ("eps", 1.0)
    assert rms_modules.recognise(Rms(mean=True)) is None
    assert rms_modules.recognise(Rms(offset=2.0)) is None
    assert rms_modules.recognise(nn.Linear(8, 8, bias=False)) is None
    norm = Rms().bfloat16()
    weight = norm.weight
    assert rms_modules.recognise(norm) == ("eps", 0.0) and norm.weight is weight
    fastattn.patch(norm)
    x = torch.randn(3, 8)
    assert norm(x).dtype is torch.float32  # of two dtypes: its own code
    assert norm(x.bfloat16()).dtype is torch.bfloat16


def test_a_whole_model_does_not_pass_by_override_for_its_routers_loss():
    model = eager("gpt_oss")
    report = fastattn.patch(model)
    assert report.left[""] == "GptOssForCausalLM: its own F.softmax is too little for a whole model"
    assert "F.softmax by fastattn" in report.replaced["model.layers.0.mlp.router"]


def test_norms_without_numbers_are_left_and_named():
    with torch.device("meta"):
        model = eager("llama")
    left = fastattn.patch(model).left
    assert set(left) == {name for name, _ in model.named_modules() if name.endswith("norm")}
    assert all("LlamaRMSNorm: has no numbers to try it on (meta)" in why for why in left.values())


def test_registering_is_asked_for():
    """Importing fastattn neither imports transformers nor registers anything there."""
    code = """
import sys, fastattn, fastattn.integrations.transformers as integration
assert "transformers" not in sys.modules
from transformers import AttentionInterface
assert "fastattn" not in AttentionInterface().valid_keys()
integration.register(); integration.register()
assert "fastattn" in AttentionInterface().valid_keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import sys
sys.modules["transformers"] = None
from fastattn.integrations import transformers
try:
    transformers.register()
except ImportError as error:
    assert "expected transformers 5 or later" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pytest_sees_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = eager("llama")
        fastattn.patch(model)
        model(**inputs("llama")[0])


def test_the_offline_example(capsys):
    """The text-generation pipeline and a sequence classifier, as eager's."""
    pytest.importorskip("tokenizers")
    example = runpy.run_path(
        str(Path(__file__).parents[1] / "examples" / "transformers_offline.py")
    )
    assert example["main"]([]) == 0
    said = capsys.readouterr().out
    assert 'config: attn_implementation="fastattn"' in said or "fastattn.nn.LayerNorm" in said
    assert "losses with fastattn" in said
