"""Random inputs of the operators, and what every backend must do with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from typing_extensions import Self

from mmlite import ops
from mmlite.ops import operator

PYRAMID = ((7, 9), (4, 5), (2, 3), (1, 1))
VARIANTS = ('shared key', 'key apart', 'standard')
OFFSETS = [
    dict(),
    dict(shared=True),
    dict(boxes=True),
    dict(boxes=True, shared=True, batch=1),
    dict(batch=1),
]
_SMALL = dict(shapes=PYRAMID[1:3], batch=1, queries=5, heads=2, dim=8, points=2)
_EIGHT_LEVELS = ((3, 2), (1, 4), (2, 2), (1, 1), (2, 1), (1, 3), (4, 1), (1, 2))
SIZES = [
    *({**_SMALL, 'dim': dim} for dim in (12, 16, 17, 24, 32, 33, 48, 64)),
    {**_SMALL, 'shapes': ((1, 1),), 'points': 1},
    {**_SMALL, 'shapes': ((1, 7), (5, 1)), 'points': 3},
    {**_SMALL, 'shapes': _EIGHT_LEVELS, 'points': 4},
    {**_SMALL, 'shapes': PYRAMID[1:], 'queries': 17, 'points': 9},
    {**_SMALL, 'batch': 2, 'queries': 1, 'heads': 3, 'points': 3},
]


class Case:
    """Random inputs of one operator variant; locations reach beyond the border of the maps."""

    def __init__(
        self,
        variant: str,
        shapes: Sequence[tuple[int, int]] = PYRAMID,
        batch: int = 2,
        queries: int = 11,
        heads: int = 3,
        dim: int = 32,
        points: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: str = 'cpu',
    ):
        self.variant = variant
        self.spatial_shapes = list(shapes)
        generator = torch.Generator().manual_seed(seed)
        tokens, levels = sum(h * w for h, w in shapes), len(shapes)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            drawn = torch.rand(batch, queries, heads, levels, points, *shape, generator=generator)
            return (drawn * (high - low) + low).to(device, dtype)

        locations = uniform(-0.3, 1.3, 2)
        self.inputs = {'value': normal(batch, tokens, heads, dim), 'locations': locations}
        if variant == 'standard':
            self.inputs['weights'] = uniform(0, 1)
        else:
            self.inputs['query'] = normal(batch, queries, heads, dim)
        if variant == 'key apart':
            self.inputs['key'] = normal(batch, tokens, heads, dim)
        self.grad_output = normal(batch, queries, heads * dim)

    def from_offsets(self, boxes: bool = False, shared: bool = False, batch: int = 0) -> Self:
        """Offsets around reference points instead of locations.

        The points are (x, y) or ``boxes`` (cx, cy, w, h), for all images with ``batch`` 1; with
        ``shared`` one set of offsets serves every level.
        """
        locations = self.inputs.pop('locations')
        images, queries, heads, levels, points, _ = locations.shape
        generator = torch.Generator().manual_seed(1)
        count = (batch or images, queries, levels)
        reference_points = torch.rand(*count, 2, generator=generator) * 1.2 - 0.1
        if boxes:
            size = torch.rand(*count, 2, generator=generator) * 0.4 + 0.1
            reference_points = torch.cat([reference_points, size], -1)
        shape = (images, queries, heads, 1 if shared else levels, points, 2)
        offsets = torch.randn(shape, generator=generator) * 2
        self.inputs['reference_points'] = reference_points.to(locations)
        self.inputs['sampling_offsets'] = offsets.to(locations)
        return self

    @property
    def names(self) -> list[str]:
        """The tensors of the registered operator in their order, also those this case lacks."""
        sampling = 'locations' if 'locations' in self.inputs else 'sampling_offsets'
        return ['query', 'key', 'value', 'reference_points', sampling, 'weights']

    @property
    def arguments(self) -> list:
        """The registered operator's arguments; no key where the value is its own."""
        arguments: list = [self.inputs.get(name) for name in self.names]
        sizes = [size for shape in self.spatial_shapes for size in shape]
        return [*arguments[:3], sizes, *arguments[3:]]

    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        """The public function of this case."""
        places = [inputs[name] for name in self.names[3:5] if name in inputs]
        suffix = '_from_offsets' if len(places) == 2 else ''
        value = inputs['value']
        if self.variant == 'standard':
            function = getattr(ops, f'ms_deform_attn{suffix}')
            return function(value, self.spatial_shapes, *places, inputs['weights'])
        function = getattr(ops, f'key_aware_deform_attn{suffix}')
        key = inputs.get('key', value)
        return function(inputs['query'], key, value, self.spatial_shapes, *places)

    def run(self, backend: str, widen: bool = False, only: str | None = None) -> dict[str, Tensor]:
        """Output and gradients, all or one, by name; with ``widen`` from float32 inputs."""
        inputs = {
            name: (tensor.float() if widen else tensor).detach().clone()
            for name, tensor in self.inputs.items()
        }
        wanted = {name: t.requires_grad_() for name, t in inputs.items() if only in (None, name)}
        with ops.use_backend(backend):
            output = self.call(inputs)
            grads = torch.autograd.grad(output, list(wanted.values()), self.grad_output.to(output))
        return {'output': output.detach(), **dict(zip(wanted, grads))}

    def run_module(self, module: ModuleType, only: str | None = None) -> dict[str, Tensor]:
        """As :meth:`run`, from the two functions that a backend registers."""
        output = module.forward(*self.arguments)
        wanted = [only in (None, name) for name in self.names]
        grads = dict(zip(self.names, module.backward(self.grad_output, *self.arguments, wanted)))
        expected = {name for name in self.inputs if only in (None, name)}
        assert all(not grad.numel() for name, grad in grads.items() if name not in expected)
        return {'output': output, **{name: grads[name] for name in expected}}

    @staticmethod
    def compare(
        actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, grad_rtol: float
    ) -> None:
        """Errors relative to the largest element, which here is of order one."""
        for name, wanted in expected.items():
            assert actual[name].shape == wanted.shape, name
            if not wanted.numel():
                continue
            error = (actual[name].double() - wanted.double()).abs().max()
            scale = max(wanted.double().abs().max().item(), 0.01)
            allowed = (rtol if name == 'output' else grad_rtol) * scale
            assert error <= allowed, f'{name}: {error:.2e} > {allowed:.2e}'

    @staticmethod
    def compare_bits_of_nonsense(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """NaN and infinities in the same places, and about the same numbers elsewhere.

        Two liberties with the gradients of locations, where the reference's is NaN: outside the map
        it is zero (grid_sample on the CPU makes NaN of it where everything else of the query is
        NaN), and elsewhere a kernel that sums over channels first may find it infinite.
        """
        for name, wanted in expected.items():
            if name == 'locations':
                free = wanted.isnan() & (actual[name].isinf() | (actual[name] == 0))
                wanted = torch.where(free, actual[name], wanted)
            torch.testing.assert_close(actual[name], wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def infinite_cases(variant: str, odd: float, points: int, **sizes) -> Iterator[Case]:
    """One feature that is not finite, in a corner, on an edge, and in the middle of a map."""
    for row, column in ((0, 0), (0, 3), (3, 7), (2, 4)):
        for name in ('value',) if variant == 'standard' else ('value', 'key', 'query'):
            case = Case(
                variant, ((4, 8), (2, 2)), 1, heads=1, dim=8, points=points, seed=3, **sizes
            )
            if name not in case.inputs:
                continue
            locations = case.inputs['locations']
            # Half of the locations on half pixels, where bilinear weights are zero.
            sides = torch.tensor([(8, 4), (2, 2)], device=locations.device).view(2, 1, 2)
            locations[:, ::2] = ((locations * 2 * sides).round() / (2 * sides))[:, ::2]
            index = slice(None, None, 7) if name == 'query' else row * 8 + column
            case.inputs[name][0, index, 0, 3] = odd
            yield case


class BackendTests:
    """The tests of every fused backend, against the PyTorch formulation.

    A subclass says how a case runs.
    """

    backend = ''  # for use_backend
    device = 'cpu'
    is_registered = True  # whether the public functions reach it here
    ulps = 0.505  # of a half-precision result
    points_of_nonsense, queries_of_nonsense, step_of_nonsense = (4,), 60, 1

    def run(self, case: Case, only: str | None = None) -> dict[str, Tensor]:
        return case.run(self.backend, only=only)

    def check(self, case: Case, rtol: float = 1e-5, grad_rtol: float = 1e-4) -> None:
        case.compare(self.run(case), case.run('reference'), rtol, grad_rtol)

    def case(self, variant: str, *args, **sizes) -> Case:
        return Case(variant, *args, **sizes, device=self.device)

    @pytest.fixture(params=VARIANTS)
    def variant(self, request) -> str:
        return request.param

    @pytest.mark.parametrize('sizes', SIZES, ids=str)
    def test_sizes(self, variant, sizes):
        self.check(self.case(variant, **sizes))

    @pytest.mark.parametrize('kind', OFFSETS, ids=str)
    def test_from_offsets(self, variant, kind):
        self.check(self.case(variant, PYRAMID[1:3], 2, 5, 2, 12, 3).from_offsets(**kind))

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ('kind', 'widened'),
        [
            ('locations', ()),
            ('locations', ('locations',)),
            ('offsets', ('reference_points',)),
            ('boxes', ()),
            ('boxes', ('sampling_offsets', 'weights')),
        ],
    )
    def test_half_precision(self, variant, dtype, kind, widened):
        """Computed in float32 and rounded once, output and gradients alike."""
        # Sizes that are powers of two: where the gradient jumps, both must see the same side.
        case = self.case(variant, ((8, 4), (2, 2)), 1, 5, 2, 16, 3, dtype)
        if kind != 'locations':
            case.from_offsets(boxes=kind == 'boxes')
        for name in widened:
            if name in case.inputs:
                case.inputs[name] = case.inputs[name].float() + 1e-3
        actual, expected = self.run(case), case.run('reference', widen=True)
        for name, tensor in actual.items():
            assert tensor.dtype == (dtype if name == 'output' else case.inputs[name].dtype), name
        rounding = self.ulps * torch.finfo(dtype).eps
        case.compare(actual, expected, rounding, rounding)

    def test_wild_locations_count_as_outside(self, variant):
        wild = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e30, -1e30, 5.0])
        wild = wild.to(self.device)
        case = self.case(variant, ((4, 5), (2, 3)), 1, 14, 1, 8, 3)
        locations = case.inputs['locations']
        locations[:, :6] = wild.view(6, 1, 1, 1, 1)
        locations[0, 6:12, 0, 0, 1, 0] = wild
        locations[0, 6:12, 0, 1, 2, 1] = wild
        self.check(case)
        grad = self.run(case)['locations']
        assert grad.isfinite().all() and not grad[:, :6].any()

    @pytest.mark.parametrize('boxes', [False, True])
    def test_wild_offsets_count_as_outside(self, variant, boxes):
        """Offsets that are no numbers move nothing, and no gradient is NaN because of them."""
        wild = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e30, -1e30])
        case = self.case(variant, ((4, 5), (2, 3)), 1, 5, 1, 8, 3).from_offsets(boxes)
        case.inputs['sampling_offsets'][:] = wild.view(5, 1, 1, 1, 1).to(self.device)
        actual = self.run(case)
        case.inputs['sampling_offsets'][:] = 1e4
        expected = self.run(case)
        for name in ('output', 'value', 'reference_points', 'sampling_offsets'):
            assert torch.equal(actual[name], expected[name]), name
        assert not actual['sampling_offsets'].any() and not actual['reference_points'].any()

    def test_rows_not_sampled_are_not_read(self, variant):
        """A row that no point touches may hold anything."""
        case = self.case(variant, ((4, 4),), 1, 7, 1, 8, 4)
        case.inputs['locations'].clamp_(-0.2, 0.3)
        case.inputs['locations'][0, 0] = -3
        expected = case.run('reference')
        for name in ('value', 'key'):
            if name in case.inputs:
                case.inputs[name][0, 12:] = float('nan')
        case.compare(self.run(case), expected, 1e-5, 1e-4)

    def test_borders_and_pixel_centres(self, variant):
        """Locations on every half pixel from one pixel before a map to one behind it."""
        case = self.case(variant, ((4, 8),), 1, 13 * 21, 1, 16, 1)
        y, x = torch.meshgrid(torch.arange(-2, 11) / 8, torch.arange(-2, 19) / 16, indexing='ij')
        case.inputs['locations'][:] = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2)
        self.check(case)

    @pytest.mark.parametrize('odd', [float('nan'), float('inf'), -float('inf')])
    def test_features_that_are_not_finite(self, variant, odd):
        """As in the reference: on borders, with weights of zero, in every gradient."""
        for points in self.points_of_nonsense:
            sizes = dict(queries=self.queries_of_nonsense, device=self.device)
            cases = list(infinite_cases(variant, odd, points, **sizes))
            for case in cases[:: self.step_of_nonsense]:
                case.compare_bits_of_nonsense(self.run(case), case.run('reference'))

    def test_only_the_gradients_asked_for(self, variant):
        case = self.case(variant, **_SMALL).from_offsets()
        expected = self.run(case)
        for name in case.inputs:
            actual = self.run(case, only=name)
            assert actual.keys() == {'output', name}
            case.compare(actual, {name: expected[name]}, 0, 1e-6)

    @pytest.mark.parametrize('variant', ['shared key', 'key apart'])
    def test_large_logits(self, variant):
        """The softmax neither overflows nor loses the small weights, over several chunks."""
        case = self.case(variant, queries=5, heads=1, dim=16, points=11)
        case.inputs['query'] *= 200
        self.check(case)

    def test_any_strides(self, variant):
        """Views of wider, transposed and expanded tensors give what their copies give."""
        case = self.case(variant, PYRAMID[2:], 2, 3, 2, 8)
        expected = case.run('reference')
        for name, tensor in case.inputs.items():
            if name == 'query':
                case.inputs[name] = torch.cat([tensor, tensor], -2)[:, :, : tensor.shape[2]]
            else:
                case.inputs[name] = tensor.transpose(0, 3).contiguous().transpose(0, 3)
        case.compare(self.run(case), expected, 1e-5, 1e-4)
        case.inputs['locations'] = case.inputs['locations'].flip(-1).contiguous().flip(-1)
        case.inputs['value'] = case.inputs['value'][:, :, :1].expand(-1, -1, 2, -1)
        case.grad_output = case.grad_output[:1, :1].expand_as(case.grad_output)
        self.check(case)

    @pytest.mark.parametrize('empty', ['batch', 'queries'])
    def test_nothing_to_do(self, variant, empty):
        case = self.case(variant, **{**_SMALL, empty: 0})
        actual = self.run(case)
        assert actual['output'].shape == case.grad_output.shape
        self.check(case)

    def test_opcheck(self, variant):
        if not self.is_registered or not hasattr(torch.library, 'opcheck'):
            pytest.skip('needs the device, and torch 2.4')
        for case in (self.case(variant, batch=1), self.case(variant, batch=1).from_offsets()):
            backward = (case.grad_output, *case.arguments, [True] * 6)
            torch.library.opcheck(operator.deform_attn_backward, backward)
            for tensor in case.inputs.values():
                tensor.requires_grad_()
            torch.library.opcheck(operator.deform_attn, case.arguments)

    @pytest.mark.parametrize('how', ['compiled', 'recomputed'])
    def test_in_a_graph_and_under_checkpointing(self, variant, how):
        if not self.is_registered or (how == 'compiled' and torch.__version__ < (2, 2)):
            pytest.skip('needs the device, and a compiler that knows `is` and sets: torch 2.2')
        case = self.case(variant)
        expected, call = case.run(self.backend), case.call
        if how == 'compiled':
            case.call = torch.compile(call, fullgraph=True, backend='aot_eager')
        else:
            case.call = lambda inputs: torch.utils.checkpoint.checkpoint(
                call, inputs, use_reentrant=False
            )
        case.compare(case.run(self.backend), expected, 1e-6, 1e-5)
