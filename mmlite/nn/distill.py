"""Distillation: a student encoder learns to give the tokens of its teacher, without labels.

A trained stock encoder is the teacher of the Lite encoder made from it. No annotation is needed:
the teacher's tokens, on any images, say what the student's should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .encoder import InterleavedEncoder
from .schedule import stock_layers


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    iterations: int = 400,
    lr: float = 13e-3,
    report: Callable[[int, float], None] = lambda iteration, loss: None,
) -> None:
    """Train the encoder of a student to follow its teacher, in place.

    By :class:`EncoderOptimizer`, at a rate that rises for a twentieth of the iterations and then
    falls to zero as a cosine. All other parameters of the student stay as they are. An elastic
    encoder learns three of its schedules in every update; see ``InterleavedEncoder.turns``.

    Args:
        student (nn.Module): An :class:`InterleavedEncoder`, or a model that holds one.
        teacher (nn.Module): The stock encoder, or the model with it in the same place.
        batches (Iterable): What both modules are called with, a dict of keyword arguments or a
            tuple; gone through again and again.
        iterations (int): Updates of the student.
        lr (float): The highest learning rate.
        report (Callable): Told the number of iterations done and the loss of the last.

    Raises:
        ValueError: The student has no Lite encoder, or the teacher none in that place.
    """
    found = [(n, m) for n, m in student.named_modules() if isinstance(m, InterleavedEncoder)]
    if not found:
        raise ValueError(f'{type(student).__name__} has no Lite encoder to train; see to_lite')
    name, encoder = found[0]
    stock = dict(teacher.named_modules()).get(name)
    layers = getattr(stock, 'layers', None)
    if layers is None or isinstance(stock, InterleavedEncoder):
        raise ValueError(
            f'{type(teacher).__name__} is no teacher: it has no stock encoder {name!r}; copy the '
            'model before to_lite'
        )
    optimizer = EncoderOptimizer(encoder.parameters(), lr)
    rates = [group['lr'] for group in optimizer.param_groups]
    teacher.eval()
    student.eval()
    encoder.train()
    for iteration, batch in enumerate(_repeated(batches, iterations)):
        with torch.no_grad(), keep_outputs(layers) as known:
            _call(teacher, batch)
        if encoder.swaps:
            known = [tokens.transpose(0, 1) for tokens in known]
        distances = []
        for _ in range(encoder.turns):
            ours, theirs = zip(*compared_layers(encoder))
            own, wanted = [encoder.layers[i] for i in ours], [known[i] for i in theirs]
            with keep_outputs(own, fed(wanted, iteration, iterations)) as kept:
                _call(student, batch)
            distances.append(token_distance(kept, wanted))
        loss = torch.stack(distances).mean()
        for group, rate in zip(optimizer.param_groups, rates):
            group['lr'] = rate * learning_rate(iteration, iterations)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        report(iteration + 1, float(loss.detach()))
    student.eval()


class Muon(torch.optim.Optimizer):
    """Steps along an orthogonal matrix near the momentum, as large as AdamW's.

    Muon of Jordan et al., as PyTorch has it from 2.9 on, for tensors of two dimensions and more; a
    kernel of a convolution is the matrix (out, in * height * width). On a CPU it computes in
    float32: without AVX-512 products in bfloat16 take twenty times as long.
    """

    def __init__(
        self, params: Iterable, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is None:
                    continue
                state, momentum = self.state[parameter], group['momentum']
                mean = state.setdefault('momentum_buffer', torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - momentum)
                step = _orthogonal(parameter.grad.lerp(mean, momentum).flatten(1))
                parameter.mul_(1 - group['lr'] * group['weight_decay'])
                size = 0.2 * group['lr'] * math.sqrt(max(step.shape))
                parameter.add_(step.view_as(parameter), alpha=-size)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near one, by five steps of Newton and Schulz.

    A step multiplies by a polynomial of ``found @ found.T``. The steps of a long matrix are taken
    on that small product and applied to the matrix once. bfloat16 is too coarse for this.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide.bfloat16() if wide.is_cuda else wide.float()
    found = found / found.norm().clamp(min=1e-7)
    is_long = not wide.is_cuda and wide.shape[1] > 2 * wide.shape[0]
    gram = product = found @ found.T
    step = torch.eye(len(found), device=found.device) if is_long else found
    for number in range(5):
        if number:
            gram = step @ product @ step.T if is_long else step @ step.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        step = torch.addmm(step, factor, step, beta=3.4445)
    step = step @ found if is_long else step
    return (step if wide is matrix else step.T).to(matrix.dtype)


class EncoderOptimizer(torch.optim.Optimizer):
    """:class:`Muon` for matrices and kernels of eight rows and more, AdamW for what is left.

    Muon comes further in few iterations (docs/from-stock.md).

    Args:
        params (Iterable): Parameters, or groups of them with an ``lr`` of their own; those that
            need no gradient are left out.
        lr (float): Learning rate of both.
        weight_decay (float): Decoupled weight decay.
        momentum (float): Of Muon. Less than its usual 0.95 comes further in few iterations.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 13e-3,
        weight_decay: float = 1e-4,
        momentum: float = 0.8,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        large: list[dict] = []
        rest: list[dict] = []
        for group in self.param_groups:
            trained = [parameter for parameter in group['params'] if parameter.requires_grad]
            few = [parameter for parameter in trained if parameter.dim() < 2 or len(parameter) < 8]
            ids = set(map(id, few))
            many = [parameter for parameter in trained if id(parameter) not in ids]
            large += [{**group, 'params': many}] if many else []
            rest += [{**group, 'params': few, 'weight_decay': 0.0}] if few else []
        self.parts: list[torch.optim.Optimizer] = []
        if large:
            self.parts.append(Muon(large, lr, weight_decay, momentum))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {'parts': [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, kept in zip(self.parts, state['parts']):
            part.load_state_dict(kept)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def learning_rate(iteration: int, iterations: int) -> float:
    """Share of the highest learning rate: a short rise and the half of a cosine down to zero."""
    rise = min((iteration + 1) / max(iterations / 20, 1), 1)
    return rise * (1 + math.cos(math.pi * iteration / iterations)) / 2


def compared_layers(student: InterleavedEncoder) -> list[tuple[int, int]]:
    """After which layers of the student all tokens are compared, and with which of the teacher.

    Of the student's next call, they are those that update the largest map, after which no tokens
    wait, and the last.

    Args:
        student (InterleavedEncoder): A Lite encoder.

    Returns:
        list[tuple[int, int]]: Numbers of a layer of the student and of the teacher's layer that
        has updated the high-level tokens as often.
    """
    schedule = student.next_schedule
    largest, is_low = schedule.num_levels - 1, schedule.num_low_levels > 0
    steps = schedule.steps(student.update)
    pairs = list(enumerate(stock_layers(steps)))
    compared = [pair for pair, step in zip(pairs, steps[:-1]) if step.updates(largest, is_low)]
    return [*compared, pairs[-1]]


def fed(wanted: Sequence[Tensor], iteration: int, iterations: int) -> Sequence[Tensor]:
    """What the blocks of a student are given in place of each other's tokens.

    In the first half of a training each block starts from the teacher's tokens, and learns what
    it has to add whatever the blocks before it do yet; then they learn together.
    """
    return wanted[:-1] if 2 * iteration < iterations else ()


@contextmanager
def keep_outputs(
    modules: Iterable[nn.Module], instead: Sequence[Tensor] = ()
) -> Iterator[list[Tensor]]:
    """Keep what modules return: of each call one tensor, the first where there are more.

    Args:
        modules (Iterable[nn.Module]): Called in this order.
        instead (Sequence[Tensor]): What the first of them seem to return to who calls them.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        while not isinstance(output, Tensor):  # transformers' Grounding DINO has pairs of pairs
            output = output[0]
        kept.append(output)
        return instead[len(kept) - 1] if len(kept) <= len(instead) else None

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(keep))
        yield kept


def token_distance(
    found: Sequence[Tensor], wanted: Sequence[Tensor], padding_mask: Tensor | None = None
) -> Tensor:
    """Mean squared distance of tokens, in units of the variance of those that are wanted.

    Args:
        found (Sequence[Tensor]): Tokens after some layers, shape (bs, num_tokens, channels).
        wanted (Sequence[Tensor]): The teacher's, of the same shapes.
        padding_mask (Tensor, optional): bool, True on padding, which does not count, shape
            (bs, num_tokens).

    Returns:
        Tensor: A scalar: 0 where they are equal, 1 where a layer gives the mean alone.
    """
    distances = []
    for ours, theirs in zip(found, wanted):
        if padding_mask is not None:
            ours, theirs = ours[~padding_mask], theirs[~padding_mask]
        # In float32, also under autocast: squares of half precision overflow.
        ours, theirs = ours.float().flatten(0, -2), theirs.float().flatten(0, -2)
        distances.append((ours - theirs).square().mean() / theirs.var(0).mean())
    return torch.stack(distances).mean()


def _repeated(batches: Iterable[Any], iterations: int) -> Iterator[Any]:
    done = 0
    while done < iterations:
        before = done
        for batch in batches:
            if done == iterations:
                return
            yield batch
            done += 1
        if done == before:
            raise ValueError('there are no batches to learn from')


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
