"""Training a Lite detector from its trained stock detector, on images without labels.

The stock detector is the teacher. Both see the same feature maps. The Lite encoder learns to give
the teacher's tokens, and what the teacher's decoder and heads make of them, query by query.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmdet.registry import MODELS, OPTIMIZERS
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import Change
from ..nn.distill import EncoderOptimizer, compared_layers, fed, keep_outputs, token_distance
from .checkpoints.loading import load_checkpoint
from .checkpoints.official import unpack
from .families import encoder_name, find_holder, parts_of, type_name
from .layers import fuse_attention

if TYPE_CHECKING:
    from .checkpoints.warm_start import WarmStart

OPTIMIZERS.register_module(module=EncoderOptimizer)

# What a detector's pre_decoder chooses; the rest of what it returns are the encoder's tokens.
_CHOSEN = ('query', 'query_pos', 'reference_points')


@MODELS.register_module()
class DistilledDetector(BaseModel):
    """A Lite detector that is trained by its stock detector, without labels.

    Its checkpoints are those of the Lite detector, under the usual names, and in testing it is
    the Lite detector. Training changes the encoder alone. An elastic encoder learns three of its
    schedules in each iteration, from one pass of the teacher.

    Args:
        detector (dict): Config of the Lite detector.
        teacher (str): Checkpoint of its trained stock detector.
        weights (dict, optional): Of the losses ``tokens`` (distance of the encoders' tokens),
            ``classes`` and ``boxes`` (scores and boxes or masks of every decoder layer, from the
            teacher's queries) and ``proposals`` (scores of all tokens, with two stages). Defaults
            to 1 for each.
        data_preprocessor (dict, optional): Defaults to the detector's.

    Raises:
        ValueError: The detector is not Lite, or the checkpoint is not of its stock detector.
    """

    def __init__(
        self,
        detector: ConfigDict | dict,
        teacher: str,
        weights: dict[str, float] | None = None,
        data_preprocessor: ConfigDict | dict | None = None,
    ) -> None:
        detector = ConfigDict(copy.deepcopy(detector))
        super().__init__(data_preprocessor or detector.get('data_preprocessor'))
        self.config = copy.deepcopy(detector)
        self.student = MODELS.build(detector)
        self.teacher_file = str(teacher)
        self.teacher_state, _ = unpack(load_checkpoint(teacher))
        # No child: what trains, saves or averages this model leaves the teacher alone.
        from .checkpoints.warm_start import build_teacher  # loads the detectors, which load this

        self.__dict__['teacher'] = build_teacher(self.config, self.teacher_state)
        self.teacher.requires_grad_(False)
        fuse_attention(self.teacher)  # on a CPU a third of the time of an iteration
        self._check_heads()
        ones = dict.fromkeys(('tokens', 'classes', 'boxes', 'proposals'), 1.0)
        self.weights = {**ones, **(weights or {})}
        self.student.requires_grad_(False)
        self.encoder.requires_grad_(True)
        self.iterations = self.max_iterations = 0
        self.images = 0  # that it learns from
        self.distance = math.nan  # of the tokens, mean of the last twenty iterations or so
        self._register_state_dict_hook(_leave_prefix_out)
        self._register_load_state_dict_pre_hook(_put_prefix_in)

    def _check_heads(self) -> None:
        """Refuse a detector with other classes or queries: nothing here could teach them."""
        theirs, inside = self.teacher.state_dict(), f'{encoder_name(self.student)}.'
        for name, value in self.student.state_dict().items():
            shape = theirs[name].shape if name in theirs else value.shape
            if not name.startswith(inside) and shape != value.shape:
                raise ValueError(
                    f'the teacher has other classes or queries than the Lite config: {name} is of '
                    f'shape {tuple(shape)}, not {tuple(value.shape)}; give the config those of the '
                    'teacher, and train the result on your classes afterwards'
                )

    def facts(self, iterations: int) -> dict:
        """What a checkpoint says of how it came about."""
        facts = {'teacher': self.teacher_file, 'images': self.images, 'iterations': iterations}
        return {**facts, 'schedules': [str(schedule) for schedule in self.encoder.schedules]}

    @property
    def encoder(self) -> nn.Module:
        """The Lite encoder, which is what is trained."""
        return self.student.get_submodule(encoder_name(self.student))

    def start(self, data: dict) -> WarmStart:
        """Copy the teacher's weights, and fit what is new to a few images; see ``warm_start``."""
        from .checkpoints.warm_start import warm_start

        return warm_start(self.student, self.config, self.teacher_state, data)

    def train(self, mode: bool = True) -> DistilledDetector:
        """As for any module; what is not trained stays as in testing, as it is in the teacher."""
        super().train(mode)
        self.student.eval()
        self.encoder.train(mode)
        return self

    def _apply(self, function: Callable, *args: Any, **kwargs: Any) -> DistilledDetector:
        self.teacher._apply(function, *args, **kwargs)
        return super()._apply(function, *args, **kwargs)

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """The losses in mode ``'loss'``; otherwise as the Lite detector."""
        if mode != 'loss':
            return self.student(inputs, data_samples, mode)
        teacher = _Pass(self.teacher)
        with torch.no_grad():
            teacher.run(inputs, data_samples, range(len(teacher.encoder.layers)))
        rounds = [self._distances(teacher, inputs, data_samples) for _ in range(self.encoder.turns)]
        found = {name: sum(each[name] for each in rounds) / len(rounds) for name in rounds[0]}
        self.iterations += 1
        distance = float(found['tokens'].detach())
        last = distance if math.isnan(self.distance) else self.distance
        self.distance = 0.95 * last + 0.05 * distance
        return {f'loss_{name}': self.weights[name] * value for name, value in found.items()}

    def _distances(self, teacher: _Pass, inputs: Tensor, samples: list) -> dict[str, Tensor]:
        """How far the student is from the teacher's pass, with the schedule whose turn it is."""
        ours, theirs = zip(*compared_layers(self.encoder))
        wanted = [teacher.tokens[layer] for layer in theirs]
        student = _Pass(self.student)
        instead = fed(wanted, self.iterations, self.max_iterations)
        student.run(inputs, samples, ours, teacher, instead)
        found = {'tokens': token_distance(student.tokens, wanted, teacher.padding)}
        found.update(_output_distances(student.outputs, teacher.outputs))
        if teacher.proposals:
            scores, wanted_scores = student.proposals[0], teacher.proposals[0]
            found['proposals'] = _score_distance(scores, wanted_scores)
        return found


class _Pass:
    """One pass of a detector, and what shows on its way."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.encoder = model.get_submodule(encoder_name(model))
        # Mask2Former's encoder is in its head.
        outer, _, inner = encoder_name(model).partition('.')
        self.head = getattr(model, outer if inner else 'bbox_head')
        self.features = self.padding = None
        self.chosen: dict[str, Tensor] = {}

    def run(
        self,
        inputs: Tensor,
        samples: list,
        layers: Sequence[int],
        teacher: _Pass | None = None,
        instead: Sequence[Tensor] = (),
    ) -> None:
        """Run it; with a teacher's pass, on the feature maps and queries of that one."""
        model, self.outputs = self.model, None

        def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
            self.outputs = output

        def keep_padding(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.padding = kwargs.get('key_padding_mask')

        def extract(*args: Any) -> Any:
            self.features = model.__class__.extract_feat(model, *args)
            return self.features

        def choose(*args: Any, **kwargs: Any) -> tuple[dict, dict]:
            decoder, head = model.__class__.pre_decoder(model, *args, **kwargs)
            self.chosen = {name: decoder[name] for name in _CHOSEN if name in decoder}
            return {**decoder, **(teacher.chosen if teacher else {})}, head

        first = []  # what scores every token, where queries are chosen from them
        if getattr(model, 'as_two_stage', False):
            first = [self.head.cls_branches[model.decoder.num_layers]]
        with ExitStack() as stack:
            layers = (self.encoder.layers[index] for index in layers)
            self.tokens = stack.enter_context(keep_outputs(layers, instead))
            self.proposals = stack.enter_context(keep_outputs(first))
            stack.enter_context(self.head.register_forward_hook(keep_output))
            stack.enter_context(
                self.encoder.register_forward_pre_hook(keep_padding, with_kwargs=True)
            )
            change = Change('distill')
            stack.callback(change.undo, model)
            extract = extract if teacher is None else lambda *args: teacher.features
            for name, method in (('extract_feat', extract), ('pre_decoder', choose)):
                change.set(model, '', name, method)
            if hasattr(model, 'bbox_head'):
                model.predict(inputs, copy.deepcopy(samples), rescale=False)
            else:
                self.head(model.extract_feat(inputs), samples)


def _output_distances(found: tuple, wanted: tuple) -> dict[str, Tensor]:
    """Distances of class scores and of boxes or masks, of every decoder layer."""
    (scores, boxes), (wanted_scores, wanted_boxes) = (
        [torch.stack(list(part)) for part in output[:2]] for output in (found, wanted)
    )
    if boxes.shape[-1] == 4 and boxes.dim() == 4:
        weight = wanted_scores.sigmoid().amax(-1, keepdim=True)
        distance = (boxes - wanted_boxes).abs()
        classes = _score_distance(scores, wanted_scores)
    else:  # masks; the last class is no object
        p = wanted_scores.softmax(-1)
        weight = 1 - p[..., -1]
        classes = (p * (p.log() - scores.log_softmax(-1))).sum() / weight.sum()
        weight = weight[..., None, None]
        distance = F.binary_cross_entropy_with_logits(
            boxes, wanted_boxes.sigmoid(), reduction='none'
        ).mean((-1, -2), keepdim=True)
    return {'classes': classes, 'boxes': (weight * distance).sum() / weight.sum()}


def _score_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of sigmoid scores, by the sum of each token's best one."""
    # What is padded in a text has a score of minus infinity.
    found, wanted = found.clamp(min=-50).float(), wanted.clamp(min=-50).float()
    p = wanted.sigmoid()
    cross, entropy = (
        F.binary_cross_entropy_with_logits(logits, p, reduction='sum') for logits in (found, wanted)
    )
    return (cross - entropy) / p.amax(-1).sum()


def _leave_prefix_out(model: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f'{prefix}student.')]:
        state[prefix + name[len(f'{prefix}student.') :]] = state.pop(name)


def _put_prefix_in(state: dict, prefix: str, *args: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        if not name.startswith((f'{prefix}student.', f'{prefix}data_preprocessor.')):
            state[f'{prefix}student.{name[len(prefix) :]}'] = state.pop(name)


def check_resumable(settings: Config) -> None:
    """Refuse a folder in which another training has stopped; make it otherwise.

    Raises:
        ValueError: What is there was made with other settings.
    """
    folder = Path(settings.work_dir)
    told = settings.to_dict()
    changed = {name: told[name] for name in ('model', 'train_dataloader', 'train_cfg')}
    text = json.dumps(changed, indent=1, default=str, sort_keys=True)
    path = folder / 'settings.json'
    if path.is_file() and path.read_text() != text:
        raise ValueError(
            f'{folder} holds a conversion that stopped and was of other settings; remove the folder'
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def distillation_config(
    config: Config,
    teacher: str | Path,
    files: Sequence[str | Path],
    iterations: int = 400,
    batch_size: int = 16,
    work_dir: str | Path = 'work_dirs/distill',
) -> Config:
    """The config of a training of :class:`DistilledDetector`, for mmengine's runner.

    Type and ``accumulative_counts`` of the ``optim_wrapper`` are those of the Lite config, and so
    are ``default_hooks``, ``env_cfg``, ``launcher`` and what else the runner reads.

    Args:
        config (Config): The Lite detector's config; it is not changed.
        teacher (str | Path): Checkpoint of its stock detector.
        files (Sequence[str | Path]): Images.
        iterations (int): Updates of the weights.
        batch_size (int): Images at a time, of each process.
        work_dir (str | Path): Where checkpoints go. A training that stopped there goes on.

    Returns:
        Config: To be given to ``Runner.from_cfg``.
    """
    result = copy.deepcopy(config)
    wrapper = {
        name: value
        for name, value in (config.get('optim_wrapper') or {}).items()
        if name in ('type', 'accumulative_counts', 'dtype')
    }
    rise = max(iterations // 20, 1)
    elastic = find_holder(config.model)[1]['encoder'].get('elastic')
    changes = {
        'model': {
            'type': 'mmdet.DistilledDetector',
            'detector': result.pop('model'),
            'teacher': str(teacher),
        },
        'train_dataloader': {
            'batch_size': batch_size,
            'num_workers': min(config.train_dataloader.get('num_workers', 0), 2),
            'sampler': {'type': 'DefaultSampler', 'shuffle': True},
            'dataset': images_without_labels(config, files, training=True),
        },
        'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': iterations},
        'optim_wrapper': {
            'type': 'OptimWrapper',
            **wrapper,
            'optimizer': {'type': 'mmdet.EncoderOptimizer'},
            'clip_grad': {'max_norm': 1.0},
        },
        'param_scheduler': [
            {'type': 'LinearLR', 'start_factor': 0.05, 'by_epoch': False, 'end': rise},
            {'type': 'CosineAnnealingLR', 'by_epoch': False, 'T_max': iterations},
        ],
        'custom_hooks': [{'type': 'mmdet.DistillHook'}],
        # Of several processes: what only other schedules need gets no gradient in an iteration.
        'find_unused_parameters': bool(elastic),
        'work_dir': str(work_dir),
        'resume': True,
        'load_from': None,
    }
    for name, value in changes.items():
        result[name] = value
    for kind in ('val', 'test'):
        for name in ('cfg', 'dataloader', 'evaluator'):
            result.pop(f'{kind}_{name}', None)
    checkpoint = {
        'type': 'mmdet.SafeCheckpointHook',
        'by_epoch': False,
        'interval': max(iterations // 10, 25),
        'max_keep_ckpts': 1,
    }
    result.setdefault('default_hooks', {})['checkpoint'] = checkpoint
    return result


def images_without_labels(
    config: Config, files: Sequence[str | Path], training: bool = False
) -> dict:
    """The config of a data set of images, read as a detector's test images are.

    Args:
        config (Config): The detector's config. A detector that reads a text is asked for the
            classes of its data.
        files (Sequence[str | Path]): The images.
        training (bool): Mirror half of them, and resize them by the training pipeline's
            ``RandomChoiceResize`` of most scales where it has one.

    Returns:
        dict: For MMDetection's ``DATASETS``.
    """
    from mmdet.datasets import CocoDataset  # late: it loads what draws

    if 'track_head' in config.model:
        raise ValueError(
            f'{type_name(config.model.type)} reads videos, not images: train its Lite config with '
            'load_from, the stock weights, or give mmlite.to_lite the stock model'
        )
    tested = config.test_dataloader.dataset
    steps = [s for s in tested.pipeline if not type_name(s['type']).endswith('Annotations')]
    steps = copy.deepcopy(steps)
    training_parts = parts_of(config.get('train_dataloader')) if training else ()
    resizes = [s for _, s in training_parts if type_name(s.get('type')) == 'RandomChoiceResize']
    for index, step in enumerate(steps):
        if resizes and type_name(step['type']) in ('Resize', 'FixScaleResize'):
            steps[index] = copy.deepcopy(max(resizes, key=lambda resize: len(resize['scales'])))
    if training:
        steps.insert(-1, {'type': 'RandomFlip', 'prob': 0.5})
    if 'decode_head' in config.model:  # MMSegmentation batches images of one size alone
        height, width = config.model.data_preprocessor.get('size') or (512, 512)
        steps.insert(-1, {'type': 'RandomCrop', 'crop_size': (height, width)})
        steps.insert(-1, {'type': 'Pad', 'size': (width, height)})
    classes = None
    if find_holder(config.model)[2].reads_text:
        classes = (tested.get('metainfo') or CocoDataset.METAINFO)['classes']
    files = [str(file) for file in files]
    return {'type': 'mmdet.ImageFiles', 'files': files, 'pipeline': steps, 'classes': classes}
