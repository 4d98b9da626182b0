"""A patched model under DDP, FSDP2 and tensor parallelism, on two processes of this machine."""

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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
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


class RmsNorm(nn.Module):
    """As models write it out."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 1.5, width)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class SplitAttention(nn.Module):
    """Each process has the heads that its share of the projections makes."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm1, self.attention, self.norm2 = norm(16), SplitAttention(), norm(16)
        self.feed_forward = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def plan(by_sequence):
    """Heads and hidden units over the processes; by_sequence: the tokens too, in between."""
    split = {"output_layouts": Shard(1)} if by_sequence else {}
    made = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    made |= {"attention.out": RowwiseParallel(**split), "feed_forward.0": ColwiseParallel()}
    made |= {"feed_forward.2": RowwiseParallel(**split)}
    if by_sequence:  # the norms get DTensors
        whole = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
        made |= {name: PrepareModuleInput(**whole) for name in ("attention", "feed_forward")}
        made |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    return made


def in_parallel(rank, norm, by_sequence, patch):
    """Output and gradients of a block of which each rank has a share; patched before or after."""
    torch.manual_seed(0)
    block, x = Block(norm), torch.randn(2, 8, 16)
    mesh = init_device_mesh("cpu", (RANKS,))
    if patch == "before":
        assert len(fastattn.patch(block).replaced) == 3
    if by_sequence is not None:
        parallelize_module(block, mesh, plan(by_sequence))
    if patch == "after":
        report = fastattn.patch(block)
        assert "attention" in report.replaced
        if norm is RmsNorm and by_sequence:
            assert "RmsNorm: has a DTensor for a weight" in report.left["norm1"]
    out = block(x.chunk(RANKS, 1)[rank] if by_sequence else x)
    out.square().sum().backward()
    if by_sequence:
        out = DTensor.from_local(out, mesh, [Shard(1)]).full_tensor()
    grads = [p.grad for p in block.parameters()]
    return [out, *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]


def tensor_parallel(rank):
    for norm in (nn.LayerNorm, nn.RMSNorm, RmsNorm):
        expected = in_parallel(rank, norm, None, None)
        for by_sequence in (False, True):
            for patch in (None, "before", "after"):
                got = in_parallel(rank, norm, by_sequence, patch)
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def work(rank, file, on_every_rank):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS
    )
    try:
        on_every_rank(rank)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("on_every_rank", [together, tensor_parallel])
def test_a_patched_model_trains_as_an_unpatched_one(on_every_rank, tmp_path, monkeypatch):
    # This machine's own addresses only; a host name need not resolve.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.multiprocessing.spawn(work, (str(tmp_path / "meeting"), on_every_rank), nprocs=RANKS)


def test_distributed_tensors_are_refused_and_torch_serves_them_in_override(monkeypatch):
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
