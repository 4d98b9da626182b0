"""The compilations of the layer norm and softmax kernels that the table has."""

import torch

from fastattn.backends.base import LayerNormCall, SoftmaxCall
from fastattn.backends.triton import layer_norm, softmax

BF16, F32 = torch.bfloat16, torch.float32
ROWS = 8192


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_call(width, dtype=BF16, rms=False, residual=False, dropout_p=0.0, param_dtype=None):
    x, weight = tensor(ROWS, width, dtype=dtype), tensor(width, dtype=param_dtype or dtype)
    seed = tensor(dtype=torch.int64) if dropout_p else None
    bias = None if rms else weight
    return LayerNormCall(
        x, x if residual else None, weight, bias, seed, width, 1e-5, rms, dropout_p
    )


def norm_forward(arch, width, **changes):
    call = norm_call(width, **changes)
    statistics = tensor(ROWS, dtype=F32)
    outputs = (
        call.x,
        call.x if call.residual is not None else None,
        None if call.rms else statistics,
        statistics,
    )
    return [layer_norm.forward_launch(call, outputs, arch)]


def norm_backward(arch, width, **changes):
    call = norm_call(width, **changes)
    residual = call.x if call.residual is not None else None
    statistics = tensor(ROWS, dtype=F32)
    mean = None if call.rms else statistics
    grads = (call.x, residual, call.weight, call.bias)
    incoming = (call.x, residual)
    return layer_norm.backward_launches(call, call.x, (mean, statistics), incoming, grads, arch)


def soft_forward(arch, shape, dim=-1, dtype=BF16, log=False, mask=None):
    x = tensor(*shape, dtype=dtype)
    m = None if mask is None else tensor(*shape, dtype=mask)
    call = SoftmaxCall(x, dim % len(shape), m, 1.0, log, dtype)
    return [softmax.forward_launch(call, x, arch)]


def soft_backward(arch, shape, dim=-1, dtype=BF16, log=False):
    x = tensor(*shape, dtype=dtype)
    return [softmax.backward_launch(x, x, x, dim % len(shape), 1.0, log, arch)]


def variants(arch):
    """By name, kernel by kernel; the unaligned ones and those of many variants may spill."""
    for name, launches in (
        *((f"layer_norm_forward/bf16/{n}", norm_forward(arch, n)) for n in (64, 1024, 4096, 16384)),
        ("layer_norm_forward/fp32/4096", norm_forward(arch, 4096, dtype=F32)),
        ("layer_norm_forward/fp32/32768", norm_forward(arch, 32768, dtype=F32)),
        ("layer_norm_forward/bf16/32768", norm_forward(arch, 32768)),
        ("layer_norm_forward/bf16/65536", norm_forward(arch, 65536)),
        ("layer_norm_forward/bf16/4096/fp32_weights", norm_forward(arch, 4096, param_dtype=F32)),
        ("layer_norm_forward/bf16/1000", norm_forward(arch, 1000)),
        ("layer_norm_forward/bf16/1001", norm_forward(arch, 1001)),
        ("rms_norm_forward/bf16/4096", norm_forward(arch, 4096, rms=True)),
        ("add_layer_norm_forward/bf16/4096", norm_forward(arch, 4096, residual=True)),
        (
            "add_layer_norm_forward/bf16/4096/dropout",
            norm_forward(arch, 4096, residual=True, dropout_p=0.1),
        ),
        ("add_layer_norm_forward/bf16/65536", norm_forward(arch, 65536, residual=True)),
        *(
            (f"layer_norm_backward/bf16/{n}", norm_backward(arch, n))
            for n in (64, 1024, 4096, 8192)
        ),
        ("layer_norm_backward/fp32/4096", norm_backward(arch, 4096, dtype=F32)),
        ("layer_norm_backward/fp32/8192", norm_backward(arch, 8192, dtype=F32)),
        ("layer_norm_backward/bf16/16384", norm_backward(arch, 16384)),
        ("rms_norm_backward/bf16/4096", norm_backward(arch, 4096, rms=True)),
        ("add_layer_norm_backward/bf16/4096", norm_backward(arch, 4096, residual=True)),
        (
            "add_layer_norm_backward/bf16/4096/dropout",
            norm_backward(arch, 4096, residual=True, dropout_p=0.1),
        ),
        *(
            (f"softmax_forward/bf16/{n}", soft_forward(arch, (ROWS, n)))
            for n in (64, 1024, 4096, 32768)
        ),
        ("softmax_forward/fp32/4096", soft_forward(arch, (ROWS, 4096), dtype=F32)),
        ("softmax_forward/fp32/32768", soft_forward(arch, (ROWS, 32768), dtype=F32)),
        ("softmax_forward/bf16/131072", soft_forward(arch, (ROWS, 131072))),
        ("softmax_forward/bf16/1001", soft_forward(arch, (ROWS, 1001))),
        ("softmax_forward/bf16/4096/bool_mask", soft_forward(arch, (ROWS, 4096), mask=torch.bool)),
        ("softmax_forward/bf16/4096/mask", soft_forward(arch, (ROWS, 4096), mask=BF16)),
        ("softmax_forward/bf16/4096/columns", soft_forward(arch, (8, 4096, 256), dim=1)),
        ("softmax_forward/bf16/256/columns", soft_forward(arch, (64, 256, 256), dim=1)),
        ("log_softmax_forward/bf16/4096", soft_forward(arch, (ROWS, 4096), log=True)),
        *(
            (f"softmax_backward/bf16/{n}", soft_backward(arch, (ROWS, n)))
            for n in (1024, 4096, 32768)
        ),
        ("softmax_backward/bf16/131072", soft_backward(arch, (ROWS, 131072))),
        ("softmax_backward/bf16/4096/columns", soft_backward(arch, (8, 4096, 256), dim=1)),
        ("log_softmax_backward/bf16/4096", soft_backward(arch, (ROWS, 4096), log=True)),
    ):
        for launch in launches:
            kernel = launch.function.__name__.removesuffix("_kernel")
            part = "" if len(launches) == 1 or kernel.endswith("backward") else f"/{kernel}"
            yield launch.variant(name + part, main=True)
