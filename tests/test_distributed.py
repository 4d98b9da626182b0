"""A patched model under DDP and FSDP2, on two processes of this machine."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

import fastattn
from fastattn import nn as ours

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS, STEPS = 2, 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


def make():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), Attention(), nn.RMSNorm(16))


def plain(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    for layer in model[0].layers:
        fully_shard(layer)
    fully_shard(model[1])
    return fully_shard(model)


def train(wrap, patched, rank):
    """Losses of a few steps, and the parameters after them; each rank has data of its own."""
    model = make()
    if patched:
        assert fastattn.patch(model).replaced
    model = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # Adam enlarges gradients of 1e-9
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(RANKS * step + rank)
        loss = (model(torch.randn(2, 7, 16, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return model, torch.stack(losses), [w.detach() for w in weights]


def together(rank):
    """On every rank: what is asserted here is asserted there."""
    results = {(w, p): train(w, p, rank) for w in (ddp, fsdp) for p in (False, True)}
    _, expected_losses, expected = results[ddp, False]
    for _, losses, weights in results.values():
        torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights, expected, atol=1e-4, rtol=1e-3)
    _, _, alone = train(plain, True, rank)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(alone, expected, strict=True))

    model = results[ddp, True][0]
    assert type(model.module[0].layers[0].norm1) is ours.LayerNorm
    fastattn.unpatch(model)
    assert type(model.module[0].layers[0].norm1) is nn.LayerNorm

    model = results[fsdp, False][0]
    left = fastattn.patch(model).left  # fully_shard has given these classes of its own
    assert "sharded already; patch before fully_shard" in left["0.layers.0"], left

    model = results[fsdp, True][0]
    sharded = [type(model), type(model[0].layers[0]), type(model[1])]
    left = fastattn.unpatch(model).left
    assert set(left) == {"0.layers.0", "0.layers.1", "1"}, left
    assert all("sharded" in reason for reason in left.values())
    assert [type(model), type(model[0].layers[0]), type(model[1])] == sharded


def work(rank, file):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS
    )
    try:
        together(rank)
    finally:
        distributed.destroy_process_group()


def test_ddp_and_fsdp_train_a_patched_model_as_an_unpatched_one(tmp_path, monkeypatch):
    # This machine's own addresses only; a host name need not resolve.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.multiprocessing.spawn(work, (str(tmp_path / "meeting"),), nprocs=RANKS)


def test_distributed_tensors_are_refused_and_torch_serves_them_in_override(monkeypatch):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(2, 4, 6, 8)
        spread = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])
        for name, call in {
            "q": lambda: fastattn.attention(spread, spread, spread),
            "bias": lambda: fastattn.attention(x, x, x, bias=spread),
            "query": lambda: fastattn.scaled_dot_product_attention(spread, spread, spread),
            "input": lambda: fastattn.layer_norm(spread, (8,)),
            "residual": lambda: fastattn.add_rms_norm(x, spread, (8,)),
        }.items():
            with pytest.raises(TypeError, match=rf"^{name}: .* got a DTensor; call with to_local"):
                call()
        with pytest.raises(TypeError, match=r"input: .* got a DTensor"):
            fastattn.softmax(spread)
        with fastattn.override():
            out = F.layer_norm(spread, (8,))
        torch.testing.assert_close(out.full_tensor(), fastattn.layer_norm(x, (8,)))
    finally:
        distributed.destroy_process_group()
