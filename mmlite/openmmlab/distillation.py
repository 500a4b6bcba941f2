"""Training a Lite detector from its trained stock detector, on images without labels.

The stock detector is the teacher. Both see the same feature maps; the Lite encoder learns to give
the teacher's tokens, and what the decoder and the heads make of them, query by query.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.distill import compared_layers, keep_outputs, token_distance
from .checkpoints.loading import load_checkpoint
from .checkpoints.official import unpack
from .checkpoints.warm_start import build_teacher
from .families import encoder_name

# What a stock detector's pre_decoder chooses; the rest of it are the encoder's own tokens.
_QUERIES = ('query', 'query_pos', 'reference_points')


@MODELS.register_module()
class DistilledDetector(BaseModel):
    """A Lite detector that learns from its stock detector while it is trained.

    Its weights in a checkpoint are those of the Lite detector alone, under their usual names, and
    in testing it is the Lite detector. In training only what the stock detector does not have, and
    the rest of the encoder, changes.

    Args:
        detector (dict): Config of the Lite detector.
        teacher (str): Checkpoint of its stock detector.
        token_weight (float): Weight of the distance between the tokens of the two encoders.
        class_weight (float): Of that between the class scores of each decoder layer.
        box_weight (float): Of that between the boxes, or masks, of each decoder layer.
        proposal_weight (float): Of that between the class scores of all tokens in the first stage.
        data_preprocessor (dict, optional): By default the detector's.
    """

    def __init__(
        self,
        detector: ConfigDict | dict,
        teacher: str,
        token_weight: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        proposal_weight: float = 1.0,
        data_preprocessor: ConfigDict | dict | None = None,
    ) -> None:
        detector = ConfigDict(copy.deepcopy(detector))
        data_preprocessor = data_preprocessor or detector.get('data_preprocessor')
        super().__init__(data_preprocessor)
        self.student = MODELS.build(detector)
        state, _ = unpack(load_checkpoint(teacher))
        self._teacher = (build_teacher(detector, state),)  # no child
        self.weights = {
            'tokens': token_weight,
            'classes': class_weight,
            'boxes': box_weight,
            'proposals': proposal_weight,
        }
        encoder = self.student.get_submodule(encoder_name(self.student))
        self.student.requires_grad_(False)
        encoder.requires_grad_(True)

    @property
    def teacher(self) -> nn.Module:
        """The stock detector; no child of this module, so nothing trains or saves it."""
        return self._teacher[0]

    def train(self, mode: bool = True) -> DistilledDetector:
        super().train(mode)
        self.student.eval()  # as the teacher is: both give what they would predict
        self.student.get_submodule(encoder_name(self.student)).train(mode)
        return self

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        if mode != 'loss':
            return self.student(inputs, data_samples, mode)
        teacher, student = _Run(self.teacher), _Run(self.student)
        pairs = compared_layers(student.encoder)
        with torch.no_grad():
            teacher(inputs, data_samples, [layer for _, layer in pairs])
        student(inputs, data_samples, [layer for layer, _ in pairs], follow=teacher)
        return self.losses(student, teacher)

    def losses(self, student, teacher) -> dict[str, Tensor]:
        found = {'tokens': token_distance(student.tokens, teacher.tokens)}
        scores, boxes = (torch.stack(list(part)) for part in student.predictions)
        wanted, wanted_boxes = (torch.stack(list(part)) for part in teacher.predictions)
        found['classes'] = _score_distance(scores, wanted)
        weight = wanted.sigmoid().amax(-1, keepdim=True)
        found['boxes'] = (weight * (boxes - wanted_boxes).abs()).sum() / weight.sum()
        if teacher.proposals:
            found['proposals'] = _score_distance(student.proposals[0], teacher.proposals[0])
        return {f'loss_{name}': self.weights[name] * value for name, value in found.items()}


def _score_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of scores, a query's sum, mean by the teacher's objects."""
    p = wanted.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(wanted, p, reduction='none')
    cross = F.binary_cross_entropy_with_logits(found, p, reduction='none')
    return (cross - entropy).sum() / p.amax(-1).sum()


class _Run:
    """One pass of a detector and what it shows on the way."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.encoder = model.get_submodule(encoder_name(model))
        self.feats = self.chosen = None

    def __call__(self, inputs, samples, layers, follow=None):
        model = self.model
        head = getattr(model, 'bbox_head', None)
        with ExitStack() as stack:
            tokens = stack.enter_context(keep_outputs(self.encoder.layers[i] for i in layers))
            first = [head.cls_branches[-1]] if getattr(model, 'as_two_stage', False) else []
            proposals = stack.enter_context(keep_outputs(first))
            outputs = []
            stack.enter_context(head.register_forward_hook(lambda m, a, out: outputs.append(out)))
            stack.enter_context(_replaced(model, 'extract_feat', self._extract(follow)))
            stack.enter_context(_replaced(model, 'pre_decoder', self._choose(follow)))
            model.predict(inputs, copy.copy(samples), rescale=False)
        self.tokens, self.proposals, self.predictions = tokens, proposals, outputs[0]

    def _extract(self, follow):
        original = self.model.extract_feat

        def extract(*args):
            self.feats = original(*args) if follow is None else follow.feats
            return self.feats

        return extract

    def _choose(self, follow):
        original = self.model.pre_decoder

        def choose(*args, **kwargs):
            decoder_inputs, head_inputs = original(*args, **kwargs)
            self.chosen = {k: decoder_inputs[k] for k in _QUERIES if k in decoder_inputs}
            if follow is not None:
                decoder_inputs.update(follow.chosen)
            return decoder_inputs, head_inputs

        return choose


@contextmanager
def _replaced(owner: nn.Module, name: str, function: Callable) -> Iterator[None]:
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
