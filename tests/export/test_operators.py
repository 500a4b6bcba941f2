from shutil import which

import pytest
import torch
from operator_cases import VARIANTS, Case
from torch import Tensor, nn

from mmlite.export.graph import Pyramid, encode
from mmlite.export.operators import AT_LOCATIONS, PORTABLE, deform_attn
from mmlite.export.program import export_graph, exportable
from mmlite.ops import use_backend

LEVELS = [(8, 10), (4, 5), (2, 3), (1, 2)]
TOKENS = sum(height * width for height, width in LEVELS)


@pytest.mark.parametrize('offsets', [None, {}, dict(boxes=True), dict(shared=True)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_agrees_with_the_reference(variant, offsets):
    case = Case(variant)
    case.inputs['locations'][0, 0, 0] = 1e30
    case.inputs['locations'][0, 1, 0] = -torch.inf
    if offsets is not None:
        case.from_offsets(**offsets)
    with use_backend('reference'):
        expected = case.call(case.inputs)
    for table in (AT_LOCATIONS, *PORTABLE.values()):
        torch.testing.assert_close(table[deform_attn](*case.arguments), expected)


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
    return Encoder(model), *tokens


def trace_encoder(graph: Encoder, *tokens: Tensor, portable=None):
    with exportable(graph.model):
        return export_graph(graph.eval(), tokens, portable)


def test_has_no_operator_of_ours(encoder):
    def ours(program) -> set[str]:
        return {str(node.target) for node in program.graph.nodes if 'mmlite' in str(node.target)}

    assert ours(trace_encoder(*encoder))
    assert not ours(trace_encoder(*encoder, portable='gridsample'))
    gather = trace_encoder(*encoder, portable='gather')
    assert not ours(gather) and 'grid_sampler' not in str(gather.graph)


@pytest.mark.slow
@pytest.mark.skipif(not which('c++'), reason='AOTInductor needs a C++ compiler')
@pytest.mark.timeout(600)
def test_compiled_ahead_of_time(encoder, tmp_path):
    inductor = pytest.importorskip('torch._inductor')
    if not hasattr(inductor, 'aoti_compile_and_package'):
        pytest.skip('this torch has no aoti_compile_and_package')
    program = trace_encoder(*encoder, portable='gridsample')
    path = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'encoder.pt2'))
    tokens = encoder[1:]
    with torch.inference_mode():
        found = inductor.aoti_load_package(path)(*tokens)
        torch.testing.assert_close(found, program.module()(*tokens), rtol=1e-4, atol=1e-4)
