import math
from pathlib import Path

import pytest
import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps, bbox_xyxy_to_cxcywh
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from scipy.optimize import linear_sum_assignment

import mmlite  # noqa: F401

register_all_modules()
CONFIGS = Path(__file__).parents[3] / 'configs/h_deformable_detr'

NUM_QUERIES, NUM_ONE2MANY, NUM_CLASSES, NUM_LAYERS = 6, 9, 5, 3
CANVAS = (64, 96)


def config(embed_dims: int = 32, **changes) -> dict:
    """A small H-Deformable-DETR with a ResNet-18 of 8 channels."""
    ffn = dict(embed_dims=embed_dims, feedforward_channels=2 * embed_dims)
    attention = dict(embed_dims=embed_dims, num_heads=4)
    layer = dict(self_attn_cfg=attention, ffn_cfg=ffn)
    backbone = dict(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1)
    small = dict(
        num_queries=NUM_QUERIES,
        num_one2many_queries=NUM_ONE2MANY,
        backbone=dict(**backbone, norm_cfg=dict(requires_grad=True)),
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


def build(model_config: dict) -> torch.nn.Module:
    """Builds the model and moves every parameter off its special starting value."""
    torch.manual_seed(0)
    model = MODELS.build(model_config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def data(model, counts=(3, 1), padded: bool = True) -> tuple:
    """Two images, their samples with random objects, and random maps; one image may be smaller."""
    sizes = [(3, *CANVAS), (3, 50, 80) if padded else (3, *CANVAS)]
    packed = demo_mm_inputs(2, sizes, num_items=counts, num_classes=NUM_CLASSES)
    packed = model.data_preprocessor(packed, training=True)
    torch.manual_seed(3)
    maps = [(math.ceil(CANVAS[0] / s), math.ceil(CANVAS[1] / s)) for s in (8, 16, 32, 64)]
    maps = [torch.randn(2, model.embed_dims, *size) for size in maps]
    return packed['inputs'], packed['data_samples'], maps


def plain_forward(model, samples, maps):
    """The model's one-to-one part, written out: no branch, look-forward-twice in the decoder."""
    encoder_inputs, decoder_inputs = model.pre_transformer(maps, samples)
    memory = model.forward_encoder(**encoder_inputs)['memory']
    head, dims = model.bbox_head, model.embed_dims

    mask = encoder_inputs['feat_mask']
    spatial_shapes = encoder_inputs['spatial_shapes']
    features, offsets = model.gen_encoder_output_proposals(memory, mask, spatial_shapes)
    enc_logits = head.cls_branches[NUM_LAYERS](features)
    enc_boxes = head.reg_branches[NUM_LAYERS](features) + offsets
    order = enc_logits[..., 0].argsort(descending=True, stable=True)[:, : model.num_queries]
    reference = torch.stack([boxes[best] for boxes, best in zip(enc_boxes, order)]).detach()
    position = model.get_proposal_pos_embed(reference, num_pos_feats=dims // 2)
    position = model.pos_trans_norm(model.pos_trans_fc(position))[..., :dims]
    reference = reference.sigmoid()

    query = model.query_embedding.weight[: model.num_queries].repeat(len(samples), 1, 1)
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


def forward(model, samples, maps):
    inputs = model.forward_transformer(maps, samples)
    return model.bbox_head(inputs['hidden_states'], inputs['references'])


def assert_same_gradients(model, actual, expected):
    """Of scalars that are computed in two ways, relative to the largest of a parameter."""
    names, parameters = zip(*model.named_parameters())
    options = dict(allow_unused=True, retain_graph=True)
    gradients = [torch.autograd.grad(total, parameters, **options) for total in (actual, expected)]
    for name, gradient, slow in zip(names, *gradients):
        if slow is None:
            assert gradient is None or not gradient.any(), name
        else:
            scale = slow.abs().max().clamp(min=1)
            torch.testing.assert_close(gradient / scale, slow / scale, atol=1e-4, rtol=0, msg=name)


LITE = dict(type='LiteHDeformableDETR', encoder=dict(schedule='H3L1-(2+1)x1'))
STANDARD = dict(key_aware=False, small_ffn=False)


@pytest.mark.parametrize(
    ('embed_dims', 'padded', 'changes'),
    [
        *((32, True, {}), (32, False, {}), (48, True, {})),
        *((64, True, LITE), (64, False, dict(LITE, encoder=dict(LITE['encoder'], **STANDARD)))),
    ],
)
def test_without_one2many_it_is_two_stage_deformable_detr_with_tricks(embed_dims, padded, changes):
    model = build(config(embed_dims, num_one2many_queries=0, **changes)).train()
    _, samples, maps = data(model, padded=padded)
    outputs = forward(model, samples, maps)
    expected = plain_forward(model, samples, maps)[:2]
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    weights = [torch.randn_like(output) for output in outputs]
    totals = (
        sum((weight * value).sum() for weight, value in zip(weights, found))
        for found in (outputs, expected)
    )
    assert_same_gradients(model, *totals)


def test_one2many_queries_leave_one2one_outputs_alone():
    model = build(config())
    _, samples, maps = data(model)
    expected = forward(model, samples, maps)
    assert expected[0].shape[2] == NUM_QUERIES
    outputs = forward(model.train(), samples, maps)
    assert outputs[0].shape[2] == NUM_QUERIES + NUM_ONE2MANY
    for output, alone in zip(outputs, expected):
        torch.testing.assert_close(output[:, :, :NUM_QUERIES], alone, atol=1e-6, rtol=1e-5)

    # Without the mask they would change: the groups do compete for attention.
    model.group_mask = lambda num, device: None
    mixed = forward(model, samples, maps)
    assert not torch.allclose(mixed[0][:, :, :NUM_QUERIES], expected[0], atol=1e-3)


def test_one2many_queries_take_the_next_proposals_and_their_own_embedding():
    model = build(config()).train()
    _, samples, maps = data(model)
    larger = build(config(num_queries=NUM_QUERIES + NUM_ONE2MANY, num_one2many_queries=0))
    larger.load_state_dict(model.state_dict())
    found = []
    for detector in (model, larger):
        encoder_inputs, _ = detector.pre_transformer(maps, samples)
        found.append(detector.pre_decoder(**detector.forward_encoder(**encoder_inputs))[0])
    for name in ('query', 'query_pos', 'reference_points'):
        torch.testing.assert_close(*(inputs[name] for inputs in found))


def slow_losses(logits, boxes, samples, repeats: int = 1, labels_zero: bool = False):
    """Focal, L1 and GIoU loss of one layer, image by image; (images, queries, ...) inputs."""
    cls = l1 = iou = logits.new_zeros(())
    for scores, predicted, sample in zip(logits.sigmoid(), boxes, samples):
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
    num_objects = max(sum(len(sample.gt_instances) for sample in samples) * repeats, 1)
    return {
        'loss_cls': 2 * cls / num_objects,
        'loss_bbox': 5 * l1 / num_objects,
        'loss_iou': 2 * iou / num_objects,
    }


@pytest.mark.parametrize('counts', [(3, 1), (2, 0), (0, 0), (4, 4)])
def test_losses_agree_with_a_slow_obvious_computation(counts):
    head = dict(one2many_repeats=3, one2many_weight=0.5)
    model = build(config(num_one2many_queries=14, bbox_head=head)).train()
    _, samples, maps = data(model, counts)
    head_inputs = model.forward_transformer(maps, samples)
    losses = model.bbox_head.loss(**head_inputs, batch_data_samples=samples)

    outputs = model.bbox_head(head_inputs['hidden_states'], head_inputs['references'])
    encoder = plain_forward(model, samples, maps)[2:]
    slow = slow_losses(*encoder, samples, labels_zero=True)
    expected = {f'enc_{name}': value for name, value in slow.items()}
    for layer, (logits, boxes) in enumerate(zip(*outputs)):
        prefix = '' if layer == NUM_LAYERS - 1 else f'd{layer}.'
        slow = slow_losses(logits[:, :NUM_QUERIES], boxes[:, :NUM_QUERIES], samples)
        expected.update({prefix + name: value for name, value in slow.items()})
        slow = slow_losses(logits[:, NUM_QUERIES:], boxes[:, NUM_QUERIES:], samples, repeats=3)
        expected.update({f'{prefix}{name}_one2many': 0.5 * value for name, value in slow.items()})

    # MMDetection gives some losses a dimension.
    losses = {name: value.sum() for name, value in losses.items()}
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=2e-4)
    assert_same_gradients(model, sum(losses.values()), sum(expected.values()))


@pytest.mark.parametrize('changes', [{}, LITE])
@pytest.mark.parametrize('counts', [(3, 1), (0, 0)])
def test_gradients_reach_every_parameter(changes, counts):
    model = build(config(64, **changes)).train()
    images, samples, _ = data(model, counts)
    sum(value.sum() for value in model.loss(images, samples).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f'{name} takes no part'
        assert parameter.grad.isfinite().all(), name
        # Without objects only the scores learn.
        if sum(counts) and not name.startswith('backbone'):
            assert parameter.grad.any(), f'{name} learns nothing'
    results = model.eval().predict(images, samples, rescale=False)
    assert [len(each.pred_instances) for each in results] == [10, 10]


SOFTMAX = dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=False)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(as_two_stage=False), 'as_two_stage=True'),
        (dict(with_box_refine=False), 'with_box_refine=True'),
        (dict(num_one2many_queries=-1), 'num_one2many_queries=-1'),
        (dict(num_one2many_queries=1500), '1506 queries need as many tokens'),
        (dict(bbox_head=dict(one2many_repeats=0)), 'one2many_repeats=0'),
        (dict(bbox_head=dict(loss_cls=SOFTMAX)), 'use_sigmoid=True'),
    ],
)
def test_refuses_what_it_is_not(changes, message):
    with pytest.raises(ValueError, match=message):
        model = build(config(**changes)).train()
        _, samples, maps = data(model)
        model.forward_transformer(maps, samples)


@pytest.mark.parametrize(
    ('name', 'one2many'), [('h-deformable-detr', 1500), ('deformable-detr-tricks', 0)]
)
def test_configs_follow_the_paper(name, one2many):
    model = MODELS.build(Config.fromfile(CONFIGS / f'{name}_r50_8xb2-12e_coco.py').model)
    assert (model.num_queries, model.num_one2many_queries) == (300, one2many)
    assert (model.bbox_head.one2many_repeats, model.bbox_head.one2many_weight) == (6, 1)
    assert model.neck.convs[0].conv.bias is not None
    for part in model.modules():
        assert not isinstance(part, torch.nn.Dropout) or not part.p
        assert getattr(part, 'feedforward_channels', 2048) == 2048
    assert not any(layer.self_attn.attn.dropout for layer in model.decoder.layers)
