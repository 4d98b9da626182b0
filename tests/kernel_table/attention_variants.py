"""The compilations of the attention kernels that the table has."""

import torch

from fastattn.backends.base import AttentionCall, empty_output
from fastattn.backends.triton import attention_backward, attention_forward

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TENSOR_CORES = {
    "sm_80": "mma",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma",
    "gfx942": "mfma",
}


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def call(
    head_dim, dtype=BF16, q_len=4096, k_len=4096, kv_heads=16, causal=True, v_dim=None, softcap=0.0,
    window=-1, bias=None, alibi=False, sinks=False, dropout_p=0.0,
):  # fmt: skip
    k, v = (tensor(4, kv_heads, k_len, d, dtype=dtype) for d in (head_dim, v_dim or head_dim))
    return AttentionCall(
        tensor(4, 16, q_len, head_dim, dtype=dtype),
        k,
        v,
        None if bias is None else tensor(4, 16, q_len, k_len, dtype=bias),
        tensor(4, 16, dtype=F32) if alibi else None,
        tensor(16, dtype=F32) if sinks else None,
        tensor(dtype=torch.int64) if dropout_p else None,
        head_dim**-0.5,
        softcap,
        window,
        0 if causal else -1,
        k_len - q_len,
        dropout_p,
    )


def forward(arch, *arguments, **changes):
    problem = call(*arguments, **changes)
    out = empty_output(problem.q, problem.v.shape[3])
    lse = tensor(*problem.q.shape[:3], dtype=F32)
    return attention_forward.forward_launches(problem, out, lse, arch)


def backward(arch, *arguments, **changes):
    problem = call(*arguments, **changes)
    out = empty_output(problem.q, problem.v.shape[3])
    lse = tensor(*problem.q.shape[:3], dtype=F32)
    needs = (
        True,
        True,
        True,
        problem.bias is not None and problem.bias.is_floating_point(),
        problem.sinks is not None,
    )
    return attention_backward.BackwardPlan(problem, out, None, out, lse, needs, arch).launches


EVERYTHING = {
    "softcap": 30.0, "window": 1024, "bias": BF16, "alibi": True, "sinks": True, "dropout_p": 0.1,
    "kv_heads": 4,
}  # fmt: skip


def variants(arch):
    """By name, kernel by kernel. Main: bfloat16 and float16 of the usual head dims; the others may
    spill."""
    for name, main, launches in (
        *((f"bf16/{d}/causal", True, forward(arch, d)) for d in (64, 128, 256)),
        ("bf16/128/full", True, forward(arch, 128, causal=False)),
        ("fp16/128/causal", True, forward(arch, 128, F16)),
        ("fp32/64/causal", False, forward(arch, 64, F32)),
        ("bf16/80/causal", False, forward(arch, 80)),
        ("bf16/128/gqa", True, forward(arch, 128, kv_heads=4)),
        ("bf16/128/decode_gqa", True, forward(arch, 128, q_len=1, kv_heads=4)),
        ("bf16/64/short", True, forward(arch, 64, q_len=200, k_len=200)),  # plain addresses
        ("bf16/128/short", True, forward(arch, 128, q_len=200, k_len=200)),
        ("bf16/128/bias", True, forward(arch, 128, bias=BF16)),
        ("bf16/128/dropout", True, forward(arch, 128, dropout_p=0.1)),
        ("bf16/128/everything", False, forward(arch, 128, **EVERYTHING)),
        *((f"bf16/{d}/causal/backward", True, backward(arch, d)) for d in (64, 128)),
        ("bf16/256/causal/backward", False, backward(arch, 256)),
        ("fp32/64/causal/backward", False, backward(arch, 64, F32)),
        ("bf16/128/everything/backward", False, backward(arch, 128, **EVERYTHING)),
    ):
        for launch in launches:
            kernel = launch.function.__name__.removesuffix("_kernel")
            # Tiles of few rows are for the instructions of a warp, also where a group has its own.
            wide = kernel == "attention_dkdv" and name.startswith("bf16/256") and arch == "sm_90"
            few_rows = "decode" in name or wide
            tensor_core = "mma" if few_rows and arch != "gfx942" else TENSOR_CORES[arch]
            rare = kernel == "attention_again"
            multiplies = not rare and kernel not in ("attention_merge", "attention_rows")
            # On sm_100 the warps that only hand out work keep three numbers in memory.
            spills = rare or (kernel == "attention_specialized" and arch == "sm_100")
            instructions = (tensor_core,) if multiplies and not name.startswith("fp32") else ()
            name = name.removesuffix("/backward")
            yield launch.variant(f"{kernel}/{name}", main and not spills, instructions)
