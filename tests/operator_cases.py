"""Random inputs of the operators, for the tests of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

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

    @property
    def flat_shapes(self) -> list[int]:
        """The level sizes as the registered operators take them."""
        return [size for shape in self.spatial_shapes for size in shape]

    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        value, locations = inputs['value'], inputs['locations']
        if self.variant == 'standard':
            return ops.ms_deform_attn(value, self.spatial_shapes, locations, inputs['weights'])
        key = inputs.get('key', value)
        return ops.key_aware_deform_attn(
            inputs['query'], key, value, self.spatial_shapes, locations
        )

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

    def run_module(self, module: ModuleType) -> dict[str, Tensor]:
        """Output and all gradients, by name, from the functions a backend registers itself."""
        inputs = self.inputs
        args = (inputs['value'], self.flat_shapes, inputs['locations'])
        if self.variant == 'standard':
            args = (*args, inputs['weights'])
            output = module.ms_deform_attn(*args)
            grads = module.ms_deform_attn_backward(self.grad_output, *args)
            names = ('value', 'locations', 'weights')
        else:
            args = (inputs['query'], inputs.get('key'), *args)
            output = module.key_aware_deform_attn(*args)
            grads = module.key_aware_deform_attn_backward(self.grad_output, *args)
            names = ('query', 'key', 'value', 'locations')
        return {'output': output, **dict(zip(names, grads))}

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
