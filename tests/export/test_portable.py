"""The portable form: the reference's numbers, no operator of ours, and AOTInductor takes it."""

from __future__ import annotations

from shutil import which

import pytest
import torch
from torch import Tensor, nn

from mmlite.export.graph import Pyramid, encode
from mmlite.export.operators import decompositions
from mmlite.export.portable import key_aware_deform_attn, ms_deform_attn
from mmlite.export.program import trace_encoder
from mmlite.ops import reference

LEVELS = [(8, 10), (4, 5), (2, 3), (1, 2)]
FLAT = [side for size in LEVELS for side in size]
TOKENS = sum(height * width for height, width in LEVELS)


@pytest.mark.parametrize('own_key', [False, True])
def test_agrees_with_the_reference(own_key):
    torch.manual_seed(0)
    query = torch.randn(2, 30, 4, 16)
    key, value = torch.randn(2, 2, TOKENS, 4, 16).unbind()
    locations = torch.rand(2, 30, 4, len(LEVELS), 3, 2) * 1.4 - 0.2
    locations[0, 0, 0] = 1e30
    locations[0, 1, 0] = -torch.inf
    weights = torch.rand(2, 30, 4, len(LEVELS), 3)
    torch.testing.assert_close(
        ms_deform_attn(value, FLAT, locations, weights),
        reference.ms_deform_attn(value, LEVELS, locations, weights),
    )
    key = key if own_key else None
    torch.testing.assert_close(
        key_aware_deform_attn(query, key, value, FLAT, locations),
        reference.key_aware_deform_attn(query, key, value, LEVELS, locations),
    )


@pytest.mark.parametrize('boxes', [False, True])
@pytest.mark.parametrize('offset_levels', [1, len(LEVELS)])
def test_operators_from_offsets_decompose(boxes, offset_levels):
    query = torch.randn(2, 30, 4, 16)
    value = torch.randn(2, TOKENS, 4, 16)
    points = torch.rand(2, 30, len(LEVELS), 4 if boxes else 2)
    offsets = torch.randn(2, 30, 4, offset_levels, 3, 2)
    weights = torch.rand(2, 30, 4, len(LEVELS), 3)
    ((operator, decomposed),) = decompositions().items()
    for inputs in (
        (query, None, value, FLAT, points, offsets, None),
        (None, None, value, FLAT, points, offsets, weights),
    ):
        torch.testing.assert_close(decomposed(*inputs), operator(*inputs))


class Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        return encode(self.model.encoder, Pyramid(tokens, pos, LEVELS))


@pytest.fixture
def encoder(detector):
    model = detector('LiteDINO')
    tokens = torch.randn(2, 1, TOKENS, model.encoder.embed_dims).unbind()
    return model, Encoder(model), *tokens


def test_has_no_operator_of_ours(encoder):
    def ours(program) -> set[str]:
        return {str(node.target) for node in program.graph.nodes if 'mmlite' in str(node.target)}

    assert ours(trace_encoder(*encoder))
    assert not ours(trace_encoder(*encoder, portable=True))


@pytest.mark.slow
@pytest.mark.skipif(not which('c++'), reason='AOTInductor needs a C++ compiler')
@pytest.mark.timeout(600)
def test_compiled_ahead_of_time(encoder, tmp_path):
    inductor = pytest.importorskip('torch._inductor')
    if not hasattr(inductor, 'aoti_compile_and_package'):
        pytest.skip('this torch has no aoti_compile_and_package')
    program = trace_encoder(*encoder, portable=True)
    path = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'encoder.pt2'))
    compiled = inductor.aoti_load_package(path)
    _, _, *tokens = encoder
    with torch.inference_mode():
        torch.testing.assert_close(
            compiled(*tokens), program.module()(*tokens), rtol=1e-4, atol=1e-4
        )
