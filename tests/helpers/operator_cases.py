"""Random inputs of the operators, for the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from typing_extensions import Self

from mmlite import ops

PYRAMID = ((7, 9), (4, 5), (2, 3), (1, 1))
VARIANTS = ('shared key', 'key apart', 'standard')


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

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        locations = uniform(batch, queries, heads, levels, points, 2) * 1.6 - 0.3
        self.inputs = {
            'value': normal(batch, tokens, heads, dim),
            'locations': locations.to(device, dtype),
        }
        if variant == 'standard':
            weights = uniform(batch, queries, heads, levels, points)
            self.inputs['weights'] = weights.to(device, dtype)
        else:
            self.inputs['query'] = normal(batch, queries, heads, dim)
        if variant == 'key apart':
            self.inputs['key'] = normal(batch, tokens, heads, dim)
        self.grad_output = normal(batch, queries, heads * dim)

    def from_offsets(self, boxes: bool = False, shared: bool = False, batch: int = 0) -> Self:
        """The operator that takes offsets around reference points instead of locations.

        Args:
            boxes (bool): Reference points (cx, cy, w, h) instead of (x, y).
            shared (bool): One set of offsets for every level.
            batch (int): Of the reference points; 0 for that of the inputs.
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

    def run(self, backend: str, widen: bool = False) -> dict[str, Tensor]:
        """Output and all gradients, by name; with ``widen`` computed from float32 inputs."""
        inputs = {
            name: (tensor.float() if widen else tensor).detach().requires_grad_()
            for name, tensor in self.inputs.items()
        }
        with ops.use_backend(backend):
            output = self.call(inputs)
            grads = torch.autograd.grad(output, list(inputs.values()), self.grad_output.to(output))
        return {'output': output.detach(), **dict(zip(inputs, grads))}

    def run_module(self, module: ModuleType, only: str | None = None) -> dict[str, Tensor]:
        """Output and gradients, by name, from the two functions that a backend registers."""
        output = module.forward(*self.arguments)
        wanted = [only in (None, name) for name in self.names]
        grads = dict(zip(self.names, module.backward(self.grad_output, *self.arguments, wanted)))
        assert not any(grad.numel() for name, grad in grads.items() if name not in self.inputs)
        return {'output': output, **{name: grads[name] for name in self.inputs}}

    @staticmethod
    def compare(
        actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, grad_rtol: float
    ) -> None:
        """Errors relative to the largest element, which for the inputs here is of order one."""
        for name, wanted in expected.items():
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
            torch.testing.assert_close(
                actual[name],
                wanted,
                rtol=1e-4,
                atol=1e-4,
                equal_nan=True,
                msg=lambda text, name=name: f'{name}: {text}',
            )


def border_case(variant: str, dtype: torch.dtype, device: str = 'cpu') -> Case:
    """Locations on every half pixel from one pixel before a map to one behind it."""
    case = Case(variant, ((4, 8),), 1, 13 * 21, 1, 16, 1, dtype, device=device)
    y, x = torch.meshgrid(torch.arange(-2, 11) / 8, torch.arange(-2, 19) / 16, indexing='ij')
    case.inputs['locations'] = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2).to(device, dtype)
    return case


def infinite_cases(
    variant: str, odd: float, points: int, queries: int = 60, device: str = 'cpu'
) -> Iterator[Case]:
    """One feature that is not finite, in a corner, on an edge, and in the middle of a map."""
    for row, column in ((0, 0), (0, 3), (3, 7), (2, 4)):
        for name in ('value',) if variant == 'standard' else ('value', 'key', 'query'):
            case = Case(variant, ((4, 8), (2, 2)), 1, queries, 1, 8, points, seed=3, device=device)
            if name not in case.inputs:
                continue
            locations = case.inputs['locations']
            # Half of the locations on half pixels, where bilinear weights are zero.
            sizes = torch.tensor([(8, 4), (2, 2)], device=device).view(2, 1, 2)
            locations[:, ::2] = ((locations * 2 * sizes).round() / (2 * sizes))[:, ::2]
            if name == 'query':
                case.inputs[name][0, ::7, 0, 3] = odd
            else:
                case.inputs[name][0, row * 8 + column, 0, 3] = odd
            yield case
