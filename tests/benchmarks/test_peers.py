import sys
from types import SimpleNamespace

import torch

from benchmarks import peers
from mmlite import ops
from mmlite.analysis.inputs import operator_inputs
from mmlite.analysis.operators import STANDARD, OperatorOnBackend, contestants


def compare(run) -> None:
    """Outputs and gradients are those of our reference."""
    x = operator_inputs((64, 96), 2, num_heads=4, head_dim=8)
    found, _ = contestants([x], 'cpu')
    reference = next(e.run for e in found if (e.operator, e.backend) == (STANDARD, 'reference'))
    torch.testing.assert_close(run(x), reference(x))
    calls = (OperatorOnBackend(STANDARD, '', each, [x]) for each in (run, reference))
    actual, expected = (each.call('forward+backward')(0) for each in calls)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def ours(value, shapes, starts, locations, weights):
    tokens = shapes.prod(-1)
    assert torch.equal(starts, tokens.cumsum(0) - tokens)
    assert value.dtype == locations.dtype == weights.dtype
    return ops.ms_deform_attn(value, shapes, locations, weights)


def test_hugging_faces_kernel(monkeypatch):
    def backward(value, shapes, starts, locations, weights, grad, images):
        leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
        with torch.enable_grad():
            output = ours(leaves[0], shapes, starts, *leaves[1:])
        return torch.autograd.grad(output, leaves, grad)

    kernel = SimpleNamespace(
        ms_deform_attn_forward=lambda *args: ours(*args[:5]), ms_deform_attn_backward=backward
    )
    kernels = SimpleNamespace(
        # Nothing is fetched.
        install_kernel=lambda name, local_files_only, **_: local_files_only and name,
        get_local_kernel={peers.HUB_KERNEL: kernel}.get,
    )
    monkeypatch.setitem(sys.modules, 'kernels', kernels)
    compare(peers.hugging_face('cuda'))
