"""The portable form: the reference's numbers, no operator of ours, and AOTInductor takes it."""

from __future__ import annotations

from shutil import which

import pytest
import torch
from operator_cases import VARIANTS, Case
from torch import Tensor, nn

from mmlite.export.graph import Pyramid, encode
from mmlite.export.operators import attention_as, decompositions
from mmlite.export.portable import key_aware_deform_attn, ms_deform_attn
from mmlite.export.program import trace_encoder
from mmlite.ops import use_backend

LEVELS = [(8, 10), (4, 5), (2, 3), (1, 2)]
TOKENS = sum(height * width for height, width in LEVELS)


OFFSETS = {
    'locations': None,
    'points': {},
    'boxes': dict(boxes=True),
    'one set of offsets': dict(shared=True),
}


@pytest.mark.parametrize('offsets', OFFSETS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_agrees_with_the_reference(variant, offsets):
    case = Case(variant)
    case.inputs['locations'][0, 0, 0] = 1e30
    case.inputs['locations'][0, 1, 0] = -torch.inf
    if OFFSETS[offsets] is not None:
        case.from_offsets(**OFFSETS[offsets])
    with use_backend('reference'):
        expected = case.call(case.inputs)
    for table in (decompositions(), attention_as(ms_deform_attn, key_aware_deform_attn)):
        ((_, decomposed),) = table.items()
        output = decomposed(*case.arguments)
        if output is not NotImplemented:  # it is at locations already
            torch.testing.assert_close(output, expected)


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
