"""H-Deformable-DETR against a slow, obvious computation of everything it does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps, bbox_xyxy_to_cxcywh
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch.utils.flop_counter import FlopCounterMode

import mmlite  # noqa: F401

register_all_modules(init_default_scope=True)
CONFIGS = Path(__file__).parents[3] / 'configs/h_deformable_detr'

NUM_QUERIES, NUM_ONE2MANY, NUM_CLASSES, NUM_LAYERS = 6, 9, 5, 3
CANVAS = (64, 96)


def config(embed_dims: int = 32, **changes) -> dict:
    """A small H-Deformable-DETR with a ResNet-18 of 8 channels."""
    ffn = dict(embed_dims=embed_dims, feedforward_channels=2 * embed_dims)
    attention = dict(embed_dims=embed_dims, num_heads=4)
    layer = dict(self_attn_cfg=attention, ffn_cfg=ffn)
    small = dict(
        num_queries=NUM_QUERIES,
        num_one2many_queries=NUM_ONE2MANY,
        backbone=dict(
            depth=18,
            base_channels=8,
            init_cfg=None,
            frozen_stages=-1,
            norm_cfg=dict(requires_grad=True),
        ),
        neck=dict(in_channels=[16, 32, 64], out_channels=embed_dims, norm_cfg=dict(num_groups=4)),
        encoder=dict(num_layers=2, layer_cfg=layer),
        decoder=dict(num_layers=NUM_LAYERS, layer_cfg=dict(layer, cross_attn_cfg=attention)),
        positional_encoding=dict(num_feats=embed_dims // 2),
        bbox_head=dict(num_classes=NUM_CLASSES, embed_dims=embed_dims),
        test_cfg=dict(max_per_img=10),
    )
    found = Config.fromfile(CONFIGS / 'h-deformable-detr_r50_8xb2-12e_coco.py')
    found.merge_from_dict(dict(model=small))
    found.merge_from_dict(dict(model=changes))
    return found.model


def stock_config(embed_dims: int) -> dict:
    """The same model as MMDetection's two-stage Deformable DETR."""
    model = config(embed_dims, type='DeformableDETR', bbox_head=dict(type='DeformableDETRHead'))
    del model.num_one2many_queries
    for name in [name for name in model.bbox_head if name.startswith('one2many')]:
        del model.bbox_head[name]
    return model


def build(model_config: dict, seed: int = 0) -> torch.nn.Module:
    """Builds the model and moves every parameter off its special starting value."""
    torch.manual_seed(seed)
    model = MODELS.build(model_config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def samples(sizes=(CANVAS, (50, 80)), counts=(3, 1), seed: int = 1) -> list[DetDataSample]:
    """One data sample an image, with random objects; the canvas is larger than the images."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for (height, width), count in zip(sizes, counts):
        centre = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
        half = torch.rand(count, 2, generator=generator) * 0.15 + 0.05
        scale = torch.tensor([width, height, width, height])
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width),
                batch_input_shape=CANVAS,
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([centre - half, centre + half], 1) * scale,
            labels=torch.randint(NUM_CLASSES, (count,), generator=generator),
        )
        batch.append(sample)
    return batch


def images(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, *CANVAS, generator=torch.Generator().manual_seed(2))


def pyramid(embed_dims: int = 32, num: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(math.ceil(CANVAS[0] / s), math.ceil(CANVAS[1] / s)) for s in (8, 16, 32, 64)]
    return [torch.randn(num, embed_dims, *shape, generator=generator) for shape in shapes]


def plain_forward(model, feats, batch):
    """The model's one-to-one part, written out: no branch, look-forward-twice in the decoder."""
    encoder_inputs, decoder_inputs = model.pre_transformer(feats, batch)
    memory = model.forward_encoder(**encoder_inputs)['memory']
    head, dims = model.bbox_head, model.embed_dims

    mask = encoder_inputs['feat_mask']
    spatial_shapes = encoder_inputs['spatial_shapes']
    features, offsets = model.gen_encoder_output_proposals(memory, mask, spatial_shapes)
    enc_logits = head.cls_branches[NUM_LAYERS](features)
    enc_boxes = head.reg_branches[NUM_LAYERS](features) + offsets
    references = []
    for image in range(len(batch)):
        order = enc_logits[image, :, 0].argsort(descending=True, stable=True)
        references.append(enc_boxes[image, order[: model.num_queries]].detach())
    reference = torch.stack(references)
    position = model.get_proposal_pos_embed(reference, num_pos_feats=dims // 2)
    position = model.pos_trans_norm(model.pos_trans_fc(position))[..., :dims]
    reference = reference.sigmoid()

    query = model.query_embedding.weight[: model.num_queries].repeat(len(batch), 1, 1)
    valid_ratios = torch.cat([encoder_inputs['valid_ratios']] * 2, -1)
    logits, boxes = [], []
    shown = reference  # what the next prediction stands on, with its gradient
    for layer in range(NUM_LAYERS):
        query = model.decoder.layers[layer](
            query,
            query_pos=position,
            value=memory,
            key_padding_mask=mask,
            reference_points=reference[:, :, None] * valid_ratios[:, None],
            spatial_shapes=decoder_inputs['spatial_shapes'],
            level_start_index=decoder_inputs['level_start_index'],
            valid_ratios=decoder_inputs['valid_ratios'],
        )
        offset = head.reg_branches[layer](query)
        logits.append(head.cls_branches[layer](query))
        boxes.append((offset + inverse_sigmoid(shown)).sigmoid())
        shown = (offset + inverse_sigmoid(reference)).sigmoid()
        reference = shown.detach()
    return torch.stack(logits), torch.stack(boxes), enc_logits, enc_boxes.sigmoid()


def forward(model, feats, batch):
    inputs = model.forward_transformer(feats, batch)
    return model.bbox_head(inputs['hidden_states'], inputs['references'])


@pytest.mark.parametrize('embed_dims', [32, 48])
@pytest.mark.parametrize('padded', [True, False])
def test_without_one2many_it_is_two_stage_deformable_detr_with_tricks(embed_dims, padded):
    model = build(config(embed_dims, num_one2many_queries=0)).train()
    sizes = (CANVAS, (50, 80)) if padded else (CANVAS, CANVAS)
    batch, feats = samples(sizes), pyramid(embed_dims)

    logits, boxes = forward(model, feats, batch)
    expected_logits, expected_boxes, _, _ = plain_forward(model, feats, batch)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(boxes, expected_boxes, atol=1e-5, rtol=1e-5)

    weights = torch.randn_like(logits), torch.randn_like(boxes)
    parameters = dict(model.named_parameters())
    gradients = []
    for output in ((logits, boxes), (expected_logits, expected_boxes)):
        total = sum((weight * value).sum() for weight, value in zip(weights, output))
        gradients.append(torch.autograd.grad(total, parameters.values(), allow_unused=True))
    for name, gradient, expected in zip(parameters, *gradients):
        assert (gradient is None) == (expected is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3, msg=name)


def test_look_forward_twice_trains_the_layer_before():
    model = build(config())
    _, boxes = forward(model, pyramid(), samples())
    branch = model.bbox_head.reg_branches
    for layer in range(NUM_LAYERS):
        reached = [
            gradient is not None and bool(gradient.any())
            for gradient in torch.autograd.grad(
                boxes[layer].sum(),
                [branch[i][-1].weight for i in range(NUM_LAYERS)],
                retain_graph=True,
                allow_unused=True,
            )
        ]
        assert reached == [i in (layer - 1, layer) for i in range(NUM_LAYERS)]


def test_one2many_queries_leave_one2one_outputs_alone():
    model = build(config())
    batch, feats = samples(), pyramid()
    expected = forward(model, feats, batch)
    outputs = forward(model.train(), feats, batch)
    assert outputs[0].shape[2] == NUM_QUERIES + NUM_ONE2MANY
    for output, alone in zip(outputs, expected):
        torch.testing.assert_close(output[:, :, :NUM_QUERIES], alone, atol=1e-6, rtol=1e-5)

    # Without the mask they would change: the groups do compete for attention.
    model.group_mask = lambda num, device: None
    mixed = forward(model, feats, batch)
    assert not torch.allclose(mixed[0][:, :, :NUM_QUERIES], expected[0], atol=1e-3)


def test_one2many_queries_take_the_next_proposals_and_their_own_embedding():
    model = build(config()).train()
    batch, feats = samples(), pyramid()
    larger = build(config(num_queries=NUM_QUERIES + NUM_ONE2MANY, num_one2many_queries=0))
    larger.load_state_dict(model.state_dict())
    for name in ('query', 'query_pos', 'reference_points'):
        values = []
        for detector in (model, larger):
            encoder_inputs, _ = detector.pre_transformer(feats, batch)
            memory = detector.forward_encoder(**encoder_inputs)
            values.append(detector.pre_decoder(**memory)[0][name])
        torch.testing.assert_close(*values)


def slow_losses(logits, boxes, batch, repeats: int = 1, labels_zero: bool = False):
    """Focal, L1 and GIoU loss of one layer, image by image; (images, queries, ...) inputs."""
    cls = l1 = iou = logits.new_zeros(())
    for scores, predicted, sample in zip(logits.sigmoid(), boxes, batch):
        height, width = sample.img_shape
        wanted = sample.gt_instances.bboxes / torch.tensor([width, height] * 2)
        wanted = bbox_xyxy_to_cxcywh(wanted).repeat(repeats, 1)
        labels = sample.gt_instances.labels.repeat(repeats) * (not labels_zero)
        positive = 0.25 * (1 - scores) ** 2 * -(scores + 1e-12).log()
        negative = 0.75 * scores**2 * -(1 - scores + 1e-12).log()
        corners, wanted_corners = map(bbox_cxcywh_to_xyxy, (predicted, wanted))
        cost = 2 * (positive - negative)[:, labels] + 5 * torch.cdist(predicted, wanted, p=1)
        cost = cost - 2 * bbox_overlaps(corners, wanted_corners, 'giou')
        rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.detach().numpy()))
        is_wanted = torch.zeros_like(scores, dtype=torch.bool)
        is_wanted[rows, labels[columns]] = True
        cls = cls + torch.where(is_wanted, positive, negative).sum()
        l1 = l1 + (predicted[rows] - wanted[columns]).abs().sum()
        giou = bbox_overlaps(corners[rows], wanted_corners[columns], 'giou', is_aligned=True)
        iou = iou + (1 - giou).sum()
    num_objects = max(sum(len(sample.gt_instances) for sample in batch) * repeats, 1)
    return 2 * cls / num_objects, 5 * l1 / num_objects, 2 * iou / num_objects


@pytest.mark.parametrize('counts', [(3, 1), (2, 0), (0, 0), (4, 4)])
def test_losses_agree_with_a_slow_obvious_computation(counts):
    head = dict(one2many_repeats=3, one2many_weight=0.5)
    model = build(config(num_one2many_queries=14, bbox_head=head)).train()
    batch, feats = samples(counts=counts), pyramid()
    head_inputs = model.forward_transformer(feats, batch)
    losses = model.bbox_head.loss(**head_inputs, batch_data_samples=batch)

    logits, boxes = model.bbox_head(head_inputs['hidden_states'], head_inputs['references'])
    _, _, enc_logits, enc_boxes = plain_forward(model, feats, batch)
    expected = {}
    names = ('loss_cls', 'loss_bbox', 'loss_iou')
    for name, value in zip(names, slow_losses(enc_logits, enc_boxes, batch, labels_zero=True)):
        expected[f'enc_{name}'] = value
    for layer in range(NUM_LAYERS):
        prefix = '' if layer == NUM_LAYERS - 1 else f'd{layer}.'
        one2one = logits[layer, :, :NUM_QUERIES], boxes[layer, :, :NUM_QUERIES]
        one2many = logits[layer, :, NUM_QUERIES:], boxes[layer, :, NUM_QUERIES:]
        for name, value in zip(names, slow_losses(*one2one, batch)):
            expected[prefix + name] = value
        for name, value in zip(names, slow_losses(*one2many, batch, repeats=3)):
            expected[f'{prefix}{name}_one2many'] = 0.5 * value

    assert set(losses) == set(expected)
    for name, value in expected.items():
        # MMDetection gives some losses a dimension.
        torch.testing.assert_close(losses[name].sum(), value, atol=2e-5, rtol=2e-4, msg=name)

    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(
            sum(value.sum() for value in values.values()),
            parameters,
            allow_unused=True,
            retain_graph=True,
        )
        for values in (losses, expected)
    ]
    for (name, _), gradient, slow in zip(model.named_parameters(), *gradients):
        if slow is None:
            assert gradient is None or not gradient.any(), name
        else:
            scale = slow.abs().max().clamp(min=1)
            torch.testing.assert_close(gradient / scale, slow / scale, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize('counts', [(3, 1), (0, 0)])
def test_gradients_reach_every_parameter(counts):
    model = build(config()).train()
    losses = model.loss(images(), samples(counts=counts))
    sum(value.sum() for value in losses.values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith('backbone') and not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f'{name} takes no part'
        assert parameter.grad.isfinite().all(), name
        # Without objects only the scores learn.
        if sum(counts) and not name.startswith('backbone'):
            assert parameter.grad.any(), f'{name} learns nothing'


def test_inference_costs_what_the_stock_two_stage_detector_costs():
    queries, flops = [], []
    # MMDetection's two-stage model works with 256 channels only.
    for model_config in (config(256, num_one2many_queries=50), stock_config(256)):
        model = build(model_config).requires_grad_(False)
        model.decoder.layers[0].register_forward_pre_hook(
            lambda module, args: queries.append(args[0].shape[1])
        )
        with FlopCounterMode(display=False) as counter:
            results = model.predict(images(), samples())
        flops.append(counter.get_total_flops())
        assert len(results[0].pred_instances) == 10
    assert queries == [NUM_QUERIES, NUM_QUERIES]
    assert flops[0] <= flops[1]


def test_start_of_training():
    model = MODELS.build(config())
    model.init_weights()
    head = model.bbox_head
    assert len(head.cls_branches) == len(head.reg_branches) == NUM_LAYERS + 1
    assert len({id(branch) for branch in head.cls_branches}) == NUM_LAYERS + 1
    for cls_branch, reg_branch in zip(head.cls_branches, head.reg_branches):
        torch.testing.assert_close(cls_branch.bias, torch.full_like(cls_branch.bias, -math.log(99)))
        assert not reg_branch[-1].weight.any() and not reg_branch[-1].bias.any()
    assert model.query_embedding.weight.shape == (NUM_QUERIES + NUM_ONE2MANY, 32)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(as_two_stage=False), 'as_two_stage=True'),
        (dict(num_one2many_queries=-1), 'num_one2many_queries=-1'),
    ],
)
def test_refuses_what_it_is_not(changes, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(config(**changes))


def test_refuses_a_softmax_classifier():
    loss = dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=False)
    with pytest.raises(ValueError, match='use_sigmoid=True'):
        MODELS.build(config(bbox_head=dict(loss_cls=loss)))


def test_says_when_an_image_is_too_small_for_its_queries():
    model = build(config(num_one2many_queries=1500)).train()
    with pytest.raises(ValueError, match='1506 queries need as many tokens'):
        model.forward_transformer(pyramid(), samples())


@pytest.mark.parametrize('changes', [dict(key_aware=True), dict(key_aware=False, small_ffn=False)])
def test_lite(changes):
    encoder = dict(schedule='H3L1-(2+1)x1', **changes)
    model = build(config(64, type='LiteHDeformableDETR', encoder=encoder))
    batch, feats = samples(), pyramid(64)
    expected_logits, expected_boxes, _, _ = plain_forward(model, feats, batch)
    logits, boxes = forward(model, feats, batch)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(boxes, expected_boxes, atol=1e-5, rtol=1e-5)

    losses = model.train().loss(images(), batch)
    sum(value.sum() for value in losses.values()).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith('backbone'):
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize('name', ['h-deformable-detr', 'deformable-detr-tricks'])
def test_configs_follow_the_paper(name):
    config = Config.fromfile(CONFIGS / f'{name}_r50_8xb2-12e_coco.py')
    model = MODELS.build(config.model)
    assert model.num_queries == 300
    assert model.num_one2many_queries == (1500 if name.startswith('h-') else 0)
    assert model.bbox_head.one2many_repeats == 6
    assert model.bbox_head.one2many_weight == 1
    assert model.neck.convs[0].conv.bias is not None
    for layer in (*model.encoder.layers, *model.decoder.layers):
        assert not any(m.p for m in layer.modules() if isinstance(m, torch.nn.Dropout))
        assert layer.ffn.feedforward_channels == 2048
    assert not any(layer.self_attn.attn.dropout for layer in model.decoder.layers)
