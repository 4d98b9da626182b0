"""patch and unpatch: what is replaced, what is left and why, and that it is put back."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from small_models import Block, OwnAttention, classes, models, randn, translation, vision
from torch import nn

import fastattn
from fastattn import nn as ours
from fastattn import patching


@models
@pytest.mark.parametrize("train", [True, False])
def test_results_and_gradients_stay(make, shape, train, calls):
    model, x = make().train(train), randn(*shape).requires_grad_()
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    calls.clear()
    before = classes(model)
    report = fastattn.patch(model)
    assert report.replaced and not report.left
    got = model(x)
    assert calls
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(got.square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    calls.clear()
    restored = fastattn.unpatch(model)
    assert list(restored.replaced) == list(report.replaced)
    assert classes(model) == before and not [
        m for m in model.modules() if patching._ORIGINAL in vars(m)
    ]
    assert torch.equal(model(x), expected) and not calls


def test_everything_else_stays_the_same_objects():
    model = translation().to(torch.bfloat16).eval()
    model.encoder.layers[0].train()
    seen = []
    model.decoder.norm.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    model.encoder.norm.weight.requires_grad_(False)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    modes, keys = [m.training for m in model.modules()], list(model.state_dict())
    fastattn.patch(model)
    assert all(
        a[0] == b[0] and a[1] is b[1] for a, b in zip(modules, model.named_modules(), strict=True)
    )
    assert all(a[1] is b[1] for a, b in zip(parameters, model.named_parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes and list(model.state_dict()) == keys
    assert not model.encoder.norm.weight.requires_grad
    x = randn(2, 5, 16).bfloat16()
    model(x, x)
    assert seen == [ours.LayerNorm]


@pytest.mark.parametrize("pad", [False, True])
def test_the_inference_fast_path_stands_aside(pad, calls, monkeypatch):
    model = translation().eval()
    x = randn(2, 7, 16)
    keywords = (
        {"src_key_padding_mask": torch.arange(7)[None] >= torch.tensor([[7], [4]])} if pad else {}
    )
    with torch.inference_mode():
        expected = model.encoder(x, **keywords)
        assert not calls  # torch's is one C++ call
        fastattn.patch(model)
        for name in (
            "_transformer_encoder_layer_fwd",
            "_native_multi_head_attention",
            "_nested_tensor_from_mask",
        ):
            monkeypatch.setattr(torch, name, None)
        got = model.encoder(x, **keywords)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert calls.count("attention") == 2 and calls.count("layer_norm") == 5


def test_twenty_steps_have_equal_losses():
    losses = []
    for patched in (False, True):
        model = vision()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        if patched:  # after the optimizer was made
            fastattn.patch(model)
        losses.append([])
        for step in range(20):
            loss = (model(randn(2, 7, 16, seed=step)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_the_report():
    model = nn.ModuleDict({"block": Block(), "own": OwnAttention(), "linear": nn.Linear(2, 2)})
    report = fastattn.patch(model)
    assert report.replaced["block.norm1"] == "fastattn.nn.LayerNorm"
    assert (
        report.replaced["block.attn"] == "Attention, its F.scaled_dot_product_attention by fastattn"
    )
    assert report.replaced["block.helpers"] == "ByHelpers, its F.softmax by fastattn"
    assert report.replaced["block.norm2"] == "Inherits, its F.layer_norm by fastattn"
    assert list(report.left) == ["own"] and "calls none of torch's functions" in report.left["own"]
    text = str(report)
    assert (
        text.startswith("fastattn replaced 6 modules\n")
        and "left 1 module\n  own: OwnAttention" in text
    )
    assert "linear" not in text
    many = str(fastattn.patch(vision()))
    assert "*.norm1 (x2): fastattn.nn.LayerNorm" in many


def test_a_model_with_nothing_to_patch():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = fastattn.patch(model)
    assert not report.replaced and not report.left
    assert "replaced nothing\n  the model has no attention" in str(report)
    assert classes(model) == [nn.Sequential, nn.Linear, nn.ReLU]


def test_patching_twice_and_unpatching_what_was_not():
    model = vision()
    x = randn(2, 7, 16)
    expected = model(x)
    assert "restored nothing\n  no module of the model was patched" in str(fastattn.unpatch(model))
    first = fastattn.patch(model)
    patched = classes(model)
    second = fastattn.patch(model)
    assert not second.replaced and second.left.keys() == first.replaced.keys()
    assert set(second.left.values()) == {"served by fastattn already"}
    assert classes(model) == patched
    fastattn.unpatch(model)
    assert torch.equal(model(x), expected)
    assert not fastattn.unpatch(model).replaced


def test_ours_by_construction_are_not_unpatched():
    model = nn.Sequential(ours.LayerNorm(4), nn.LayerNorm(4))
    fastattn.patch(model)
    fastattn.unpatch(model)
    assert classes(model)[1:] == [ours.LayerNorm, nn.LayerNorm]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", [False, True])
def test_scripted_models_are_refused(frozen):
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    scripted = torch.jit.script(model)
    scripted = torch.jit.freeze(scripted) if frozen else scripted
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(
            TypeError, match="model: expected a module in Python, got a scripted or frozen"
        ):
            function(scripted)
    outer = nn.Sequential(scripted, nn.LayerNorm(4))
    report = fastattn.patch(outer)
    assert list(report.replaced) == ["1"]


@pytest.mark.parametrize("model", [None, 3, nn.LayerNorm, F.softmax])
def test_what_is_no_model(model):
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got"):
            function(model)


def test_frozen_parameters_and_half_a_failure(monkeypatch):
    model = vision().requires_grad_(False)
    before, become, count = classes(model), patching._become, []

    def fails(module, new, restoring):
        count.append(module)
        if len(count) == 4:
            raise RuntimeError("out of luck")
        become(module, new, restoring)

    monkeypatch.setattr(patching, "_become", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        fastattn.patch(model)
    assert classes(model) == before and not [
        m for m in model.modules() if patching._ORIGINAL in vars(m)
    ]
    monkeypatch.undo()
    assert fastattn.patch(model).replaced


def test_what_is_left_says_why():
    replaced_forward, parametrized = nn.LayerNorm(4), nn.LayerNorm(4)
    replaced_forward.forward = lambda x: x
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.ModuleList([replaced_forward, parametrized])
    report = fastattn.patch(model)
    assert not report.replaced
    assert "its forward was replaced on the module itself" in report.left["0"]
    assert "parametrized" in report.left["1"]


def test_a_class_that_others_made_since_is_left_to_them():
    class Norm(ours.LayerNorm):
        pass

    model = nn.ModuleList([nn.MultiheadAttention(16, 4), nn.LayerNorm(4)])
    fastattn.patch(model)
    nn.utils.parametrize.register_parametrization(model[0], "in_proj_weight", nn.Identity())
    model[1].__class__ = Norm
    report = fastattn.unpatch(model)
    assert not report.replaced and type(model[1]) is Norm
    assert "parametrized since" in report.left["0"] and "not patch's" in report.left["1"]
    x = randn(3, 2, 16)
    model[0](x, x, x)
    nn.utils.parametrize.remove_parametrizations(model[0], "in_proj_weight")
    fastattn.unpatch(model)
    assert type(model[0]) is nn.MultiheadAttention


def test_a_module_used_twice():
    norm = nn.LayerNorm(16)
    model = nn.Sequential(norm, nn.Linear(16, 16), norm)
    assert list(fastattn.patch(model).replaced) == ["0"]
    assert model[0] is model[2] is norm and type(norm) is ours.LayerNorm


def test_the_model_itself():
    norm = nn.LayerNorm(4)
    assert "the model itself: fastattn.nn.LayerNorm" in str(fastattn.patch(norm))
    assert type(norm) is ours.LayerNorm
    assert type(nn.LayerNorm(4)) is nn.LayerNorm
    fastattn.unpatch(norm)
    assert type(norm) is nn.LayerNorm


@pytest.mark.parametrize(
    ("library", "replaced"),
    [
        ("torchvision", {"fastattn.nn.MultiheadAttention", "fastattn.nn.LayerNorm"}),
        (
            "timm",
            {
                "Attention, its F.scaled_dot_product_attention by fastattn",
                "LayerNorm, its F.layer_norm by fastattn",
            },
        ),
    ],
)
def test_vision_libraries(library, replaced, calls):
    """Where they are installed; ``small_models`` has what looks like them."""
    try:
        module = importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"{library}: {error}")
    if library == "timm":
        model = module.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    else:
        model = module.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=3)
        nn.init.normal_(model.heads.head.weight)  # zeros would hide everything
    x = randn(2, 3, 32, 32)
    expected = model.eval()(x)
    assert set(fastattn.patch(model).replaced.values()) == replaced
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert calls.count("attention") == 2 and calls.count("layer_norm") == 5
