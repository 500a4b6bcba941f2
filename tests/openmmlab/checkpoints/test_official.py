"""Conversion of the authors' checkpoints, by the verified mapping and the golden model."""

import copy
import json
import re
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones.swin import swin_converter
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from small_detectors import small_config

import mmlite  # noqa: F401
from mmlite.nn import EncoderSchedule
from mmlite.openmmlab.checkpoints import (
    check_conversion,
    convert_encoder_state,
    from_official,
    official_config,
    to_official,
)
from mmlite.openmmlab.checkpoints.official import COCO_IDS


@pytest.fixture(scope='module')
def golden_model(golden):
    """The golden model: its arrays, the checkpoint it would have been saved as, and its meta."""
    arrays, meta = golden('lite_dino_d256_h3l1_2p1x3_decstd.npz')
    state = {name[len('state.') :]: a for name, a in arrays.items() if name.startswith('state.')}
    return arrays, dict(model=state, args=Namespace(**meta)), meta


def data_samples(arrays):
    canvas = tuple(arrays['mask'].shape[-2:])
    for image, original in zip(arrays['image_sizes'].tolist(), arrays['orig_sizes'].tolist()):
        shapes = dict(img_shape=tuple(image), ori_shape=tuple(original), batch_input_shape=canvas)
        scale = image[1] / original[1], image[0] / original[0]
        yield DetDataSample(metainfo=dict(shapes, scale_factor=scale))


@pytest.mark.parametrize('coco_classes', [True, False])
def test_golden_lite_dino(golden_model, coco_classes):
    arrays, checkpoint, meta = golden_model
    conversion = from_official(checkpoint, 'lite-dino', coco_classes=coco_classes)
    assert str(conversion.schedule) == meta['schedule']
    config = Config.fromstring(official_config(conversion, checkpoint['args']), '.py').model
    config.backbone.depth = 18  # the quickest to build
    model = MODELS.build(config).eval()
    model.backbone = torch.nn.Identity()
    model.load_state_dict(conversion.state_dict, strict=True)
    rows = meta['coco_category_ids'] if coco_classes else list(range(91))
    samples = list(data_samples(arrays))
    with torch.no_grad():
        maps = model.neck(tuple(arrays[f'feat.{level}'] for level in range(3)))
        for level, found in enumerate(maps):
            torch.testing.assert_close(found, arrays[f'src.{level}'], atol=1e-4, rtol=0)
        encoder_inputs, decoder_inputs = model.pre_transformer(maps, samples)
        encoded = model.forward_encoder(**encoder_inputs)['memory']
        torch.testing.assert_close(encoded, arrays['memory'], atol=5e-4, rtol=0)
        # Behind the authors' own memory the agreement is closer.
        for memory, tolerance in ((arrays['memory'], 1e-4), (encoded, 5e-4)):
            shapes = encoder_inputs['feat_mask'], encoder_inputs['spatial_shapes']
            inputs, _ = model.pre_decoder(memory, *shapes, batch_data_samples=samples)
            outputs = model.forward_decoder(**{**decoder_inputs, **inputs})
            logits, boxes = model.bbox_head(outputs['hidden_states'], outputs['references'])
            expected = arrays['pred_logits'][..., rows], arrays['pred_boxes']
            torch.testing.assert_close(logits, expected[0], atol=tolerance, rtol=0)
            torch.testing.assert_close(boxes, expected[1], atol=tolerance / 10, rtol=0)
        outputs = {key: outputs[key] for key in ('hidden_states', 'references')}
        results = model.bbox_head.predict(**outputs, batch_data_samples=samples, rescale=True)
    for image, result in enumerate(results):
        count = arrays['post.scores'].shape[1]
        scores, labels = result.scores[:count], result.labels[:count]
        torch.testing.assert_close(scores, arrays['post.scores'][image], atol=1e-4, rtol=0)
        assert torch.equal(torch.tensor(rows)[labels], arrays['post.labels'][image])
        # MMDetection clamps boxes to the image, the authors do not.
        corner = arrays['orig_sizes'][image].flip(0).repeat(2)
        expected = arrays['post.boxes'][image].clamp(min=0).minimum(corner)
        torch.testing.assert_close(result.bboxes[:count], expected, atol=2e-2, rtol=0)


def assert_same(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize('coco_classes', [True, False])
def test_golden_round_trip(golden_model, coco_classes):
    _, checkpoint, meta = golden_model
    there = from_official(checkpoint, coco_classes=coco_classes)
    back = to_official(there.state_dict, 'lite-dino', coco_classes, left=there.left)
    assert not back.filled
    assert_same(checkpoint['model'], back.state_dict)
    # The table that no output shows.
    rows = meta['coco_category_ids'] if coco_classes else list(range(91))
    labels = there.state_dict['dn_query_generator.label_embedding.weight']
    assert torch.equal(labels, checkpoint['model']['label_enc.weight'][rows])

    # Without what was left, everything that MMDetection has is still exact.
    forgetful = to_official(there.state_dict, coco_classes=coco_classes)
    assert forgetful.filled and forgetful.state_dict.keys() == checkpoint['model'].keys()
    content = dict(model=forgetful.state_dict, args=checkpoint['args'])
    again = from_official(content, coco_classes=coco_classes)
    assert_same(there.state_dict, again.state_dict)


VARIANTS = {
    # Name in the schema -> schedule, and what the config must say.
    '': ('H3L1-(2+1)x3', dict(key_aware=True, small_ffn=True), True),
    'key_aware=False': ('H3L1-(2+1)x3', dict(key_aware=False, small_ffn=True), False),
    'encoder key-aware, decoder standard': ('H3L1-(2+1)x3', dict(key_aware=True), False),
    'proj_key=True': ('H3L1-(2+1)x3', dict(key_aware=True), True),
    'same_loc=True': ('H3L1-(2+1)x3', dict(key_aware=True), True),
    'small_expand=False': ('H3L1-(2+1)x3', dict(key_aware=True, small_ffn=False), True),
    'num_expansion=1 (H3L1-(6+1)x1)': ('H3L1-(6+1)x1', dict(small_ffn=True), True),
    'enc_scale=2 (H2L2-(2+1)x3)': ('H2L2-(2+1)x3', dict(key_aware=True), True),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_schema(variant):
    """A full-size state dict with random values loads with nothing missing and nothing left."""
    file = Path(__file__).parents[2] / 'data/golden/official_lite_dino_state_schema.json'
    schema = json.loads(file.read_text())
    shapes = dict(schema['state'])
    changes = schema['variants'].get(variant, {})
    shapes.update(changes.get('added', {}))
    shapes.update({name: shape for name, (_, shape) in changes.get('resized', {}).items()})
    for name in changes.get('removed', ()):
        del shapes[name]
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    for first, *others in schema['shared_tensors']['groups']:
        state.update({name: state[first] for name in others if name in state})
    # MMDetection's ResNet-50 under the authors' names.
    backbone = without_counters(MODELS.build(dict(type='ResNet', depth=50)).state_dict())
    state.update({f'backbone.0.body.{name}': value for name, value in backbone.items()})
    schedule, encoder, key_aware_decoder = VARIANTS[variant]

    conversion = from_official(dict(model=state), schedule=schedule)
    high, blocks = conversion.schedule.num_high_levels, conversion.schedule.num_blocks
    stored = dict(model=state, args=Namespace(enc_scale=high, num_expansion=blocks))
    assert from_official(stored).schedule == conversion.schedule
    text = official_config(conversion)
    check_conversion(conversion, text)
    model = Config.fromstring(text, '.py').model
    assert model.encoder.schedule == schedule
    assert {name: model.encoder[name] for name in encoder} == encoder
    assert model.decoder.key_aware == key_aware_decoder
    attention = model.encoder.layer_cfg.self_attn_cfg
    assert attention.get('proj_key', False) == ('proj_key' in variant)
    assert attention.get('same_loc', False) == ('same_loc' in variant)
    assert attention.num_points == 4
    assert model.bbox_head.num_classes == 80 and model.num_queries == 900
    assert_same(state, to_official(conversion.state_dict, left=conversion.left).state_dict)


SMALL_SWIN = dict(embed_dims=24, depths=[1, 2, 1, 1], num_heads=[1, 2, 3, 4], window_size=5)
SWIN = dict(
    backbone=dict(_delete_=True, type='SwinTransformer', out_indices=(1, 2, 3), **SMALL_SWIN),
    neck=dict(in_channels=[48, 96, 192]),
)
LITE = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x1', num_layers=2))
HYBRID = dict(
    type='HDeformableDETR', num_one2many_queries=1500, bbox_head=dict(type='HDeformableDETRHead')
)
# Name -> family, and the MMDetection model that its checkpoints become.
MODELS_OF = {
    'plain': ('deformable-detr', 'plain', {}),
    'refine': ('deformable-detr', 'refine', {}),
    'two-stage': ('deformable-detr', 'two-stage', {}),
    'h-detr': ('h-deformable-detr', 'two-stage', HYBRID),
    'h-detr-swin': ('h-deformable-detr', 'two-stage', {**HYBRID, **SWIN}),
    'dino': ('dino', 'DINO', {}),
    'dino-swin': ('dino', 'DINO', SWIN),
    'lite-dino': ('lite-dino', 'DINO', LITE),
}


@cache
def trained(name: str):
    """Family, config, and a model with random values in every parameter and buffer."""
    family, base, changes = MODELS_OF[name]
    config = small_config(base)
    config.model.merge(dict(neck=dict(bias=True), bbox_head=dict(num_classes=80)))
    config.model.merge(copy.deepcopy(changes))
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and 'schedule_code' not in name:
            value.uniform_(0.1, 1)
    return family, config.model, model


def official_state(name: str) -> dict:
    return dict(to_official(trained(name)[2].state_dict()).state_dict)


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}


@pytest.mark.parametrize('name', MODELS_OF)
@pytest.mark.parametrize('coco_classes', [True, False])
def test_round_trip_from_mmdetection(name, coco_classes):
    family, config, model = trained(name)
    schedule = 'H3L1-(2+1)x1' if family == 'lite-dino' else None
    there = to_official(model.state_dict(), family, coco_classes)
    assert len(there.state_dict['class_embed.0.weight']) == (91 if coco_classes else 80)
    # What the authors' decoder shares with the head is in their files twice.
    shared = set(re.findall(r'transformer\.decoder\.(\w+_embed)', ' '.join(there.state_dict)))
    expected = {'plain': set(), 'refine': {'bbox_embed'}}
    assert shared == expected.get(name, {'bbox_embed', 'class_embed'})
    checkpoint = dict(model={f'module.{k}': v for k, v in there.state_dict.items()})
    back = from_official(checkpoint, family, schedule, coco_classes)
    assert_same(without_counters(model.state_dict()), back.state_dict)

    text = official_config(back, num_queries=30)
    check_conversion(back, text)
    written = Config.fromstring(text, '.py').model
    for key in ('type', 'num_queries', 'with_box_refine', 'as_two_stage'):
        assert written[key] == config[key], key
    assert written.backbone.type == config.backbone.type
    drop = 0.1 if family == 'deformable-detr' else 0.0
    layer = written.encoder.layer_cfg
    assert (layer.self_attn_cfg.dropout, layer.ffn_cfg.ffn_drop) == (drop, drop)


def test_names_of_h_deformable_detr():
    """The names that the authors' code gives, written out for two layers and four levels."""
    attention = '(sampling_offsets|attention_weights|value_proj|output_proj)'
    names = (
        r'query_embed\.weight|transformer\.level_embed|('
        r'transformer\.(enc_output|enc_output_norm|pos_trans|pos_trans_norm)|input_proj\.[0-3]\.[01]|'
        r'(transformer\.decoder\.)?class_embed\.[0-2]|'
        r'(transformer\.decoder\.)?bbox_embed\.[0-2]\.layers\.[0-2]|'
        r'transformer\.(en|de)coder\.layers\.[01]\.(norm1|norm2|linear1|linear2)|'
        rf'transformer\.encoder\.layers\.[01]\.self_attn\.{attention}|'
        rf'transformer\.decoder\.layers\.[01]\.(norm3|cross_attn\.{attention}))\.(weight|bias)|'
        r'transformer\.decoder\.layers\.[01]\.self_attn\.(in_proj_|out_proj\.)(weight|bias)'
    )
    _, _, model = trained('h-detr')
    state = official_state('h-detr')
    found = [name for name in state if not name.startswith('backbone.0.body.')]
    assert [name for name in found if not re.fullmatch(names, name)] == []
    assert len(found) == 2 + 2 * (4 + 8 + 2 * 3 + 2 * 9 + 16 + 8 + 2 + 8) + 8

    def same(official, mmdet):
        assert torch.equal(state[official], model.state_dict()[mmdet])

    # The authors number the decoder's norms by module: 1 cross-attention, 2 self-attention, 3 FFN.
    for index, number in enumerate((2, 1, 3)):
        norm = f'decoder.layers.1.norms.{index}.weight'
        same(f'transformer.decoder.layers.1.norm{number}.weight', norm)
    same('query_embed.weight', 'query_embedding.weight')
    same('bbox_embed.2.layers.2.bias', 'bbox_head.reg_branches.2.4.bias')


def test_rows_of_classes():
    model, official = trained('h-detr')[2], official_state('h-detr')
    person, traffic_light, toothbrush = 0, 9, 79
    decoder = model.bbox_head.cls_branches[0].weight
    for index, category in ((person, 1), (traffic_light, 10), (toothbrush, 90)):
        assert torch.equal(official['class_embed.0.weight'][category], decoder[index])
    assert (official['class_embed.0.bias'][[0, 12, 83]] == -20).all()
    assert not official['class_embed.0.weight'][[0, 12, 83]].any()
    # The encoder's head knows "object" alone, in the first channel of both layouts.
    encoder = model.bbox_head.cls_branches[2].weight
    assert torch.equal(official['class_embed.2.weight'][0], encoder[0])
    assert torch.equal(official['class_embed.2.weight'][90], encoder[79])
    back = from_official(official).state_dict
    assert torch.equal(back['bbox_head.cls_branches.2.weight'][0], encoder[0])
    # DINO's encoder scores classes.
    model, official = trained('dino')[2], official_state('dino')
    encoder = model.bbox_head.cls_branches[2].weight
    assert torch.equal(official['transformer.enc_out_class_embed.weight'][1], encoder[0])
    assert len(official['label_enc.weight']) == 92
    assert COCO_IDS[11] == 13 and len(COCO_IDS) == 80


def test_swin_as_mmdetection_converts_it():
    _, _, model = trained('h-detr-swin')
    official = {
        name.removeprefix('backbone.0.body.'): value
        for name, value in official_state('h-detr-swin').items()
        if name.startswith('backbone.0.body.')
    }
    assert 'layers.0.downsample.reduction.weight' in official
    expected = {k: v for k, v in model.state_dict().items() if k.startswith('backbone.')}
    assert_same(swin_converter(official), expected)


ONE = torch.ones(1)
NORM = 'transformer.decoder.norm.weight'
COPY = 'transformer.decoder.bbox_embed.0.layers.0.bias'


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('dino', dict(family='lite-dino'), 'is no Lite-DINO.*use --model dino'),
        ('h-detr', dict(family='deformable-detr'), 'use --model h-deformable-detr'),
        ('plain', dict(family='h-deformable-detr'), 'use --model deformable-detr'),
        ('dino', dict(schedule='H3L1-(2+1)x3'), 'DINO has no schedule.*--from-stock'),
        ('lite-dino', {}, r'--schedule H3L1-\(2\+1\)x1 or H2L2-\(2\+1\)x1 or H1L3'),
        ('lite-dino', dict(schedule='H3L1-(1+1)x2'), r'does not fit.*which is H3L1-\(2\+1\)x1'),
        ('lite-dino', dict(schedule='H3L2-(2+1)x1'), 'it has 4 levels'),
        ('lite-dino', dict(schedule='nonsense'), 'HxLy'),
        ('lite-dino', dict(ema=True), 'no ema_model'),
        ('plain', dict(family='yolo'), 'none of deformable-detr'),
        ('h-detr', {}, r'has 1530 queries.*--num-queries'),
        ('dino', {NORM: None}, r'does not fit.*decoder\.norm\.weight'),
        ('plain', {'a.b': ONE}, r'a\.b has no place in Deformable DETR'),
        ('refine', {COPY: ONE}, 'should repeat bbox_embed'),
        ('plain', {'transformer.level_embed': None}, '--to-official.*--from-stock'),
        ('plain', {NORM: 3}, 'no state dict'),
    ],
)
def test_refusals(name, change, message):
    """Arguments that do not fit a file, and files with a name changed, added or removed."""
    names = {key: value for key, value in change.items() if '.' in key}
    state = {**official_state(name), **names}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        conversion = from_official(dict(model=state), **({} if names else change))
        check_conversion(conversion, official_config(conversion))


def test_no_way_there_or_back():
    dino, lite = (trained(name)[2].state_dict() for name in ('dino', 'lite-dino'))
    sequential = torch.tensor([3, 1, 2, 1, 1])
    several = torch.tensor([3, 1, 2, 1, 0, -1, 2, 2, 2, 1, 0])
    named = EncoderSchedule.parse('H3L1-1x2+1234').encode()
    for convert, state, message in (
        *(
            (convert_encoder_state, {name: ONE}, 'no place in the authors')
            for name in ('layers.0.linear3.weight', 'norm.weight', 'layers.0.norms.0.bias')
        ),
        # DDQ and Grounding DINO: DINO and more.
        (to_official, {**dino, 'query_map.weight': ONE}, 'no place in .*DINO'),
        (to_official, {**dino, 'text_feat_map.weight': ONE}, 'no place in .*DINO'),
        (to_official, official_state('refine'), "MMDetection's layout"),
        (to_official, {**lite, 'encoder.schedule_code': sequential}, 'for sequential updates'),
        (to_official, {**lite, 'encoder.schedule_code': several}, r'not H3L1-\(2\+1\)x1 and H2L2'),
        (to_official, {**lite, 'encoder.schedule_code': named}, r'not H3L1-1x2\+1234$'),
        (from_official, dino, '--to-official'),
    ):
        with pytest.raises(ValueError, match=message):
            convert(state)
    # A missing bias is filled.
    conversion = to_official({k: v for k, v in dino.items() if 'conv.bias' not in k})
    assert not conversion.state_dict['input_proj.3.0.bias'].any()
    assert 'input_proj.3.0.bias' in conversion.filled


@pytest.mark.parametrize('name', ['dino', 'lite-dino', 'h-detr', 'plain'])
def test_written_config_asks_for_no_more_than_there_is(name):
    """A single class and few queries give fewer predictions than the stock config asks for."""
    state = official_state(name)
    for key, value in state.items():
        if 'class_embed' in key:
            state[key] = value[:1]
        elif key == 'label_enc.weight':
            state[key] = value[:2]
    schedule = 'H3L1-(2+1)x1' if name == 'lite-dino' else None
    conversion = from_official(state, schedule=schedule)
    text = official_config(conversion, num_queries=30)
    assert Config.fromstring(text, '.py').model.test_cfg.max_per_img == 30
    check_conversion(conversion, text)
    # 80 classes give enough for what the stock config asks for.
    enough = official_config(from_official(official_state(name), schedule=schedule), num_queries=30)
    most = 300 if 'dino' in name else 100
    assert Config.fromstring(enough, '.py').model.test_cfg.max_per_img == most


def test_counters_of_batch_norms():
    """A ResNet that was trained with BatchNorm carries them, each a number without dimensions."""
    name = 'backbone.0.body.bn1.num_batches_tracked'
    state = {**official_state('dino'), name: torch.tensor(7)}
    conversion = from_official(state)
    assert conversion.left[name] == 7 and conversion.reasons[name] == 'not used here'
    assert_same(state, to_official(conversion.state_dict, left=conversion.left).state_dict)


def test_stored_arguments_decide_the_schedule():
    state = official_state('lite-dino')
    args = Namespace(enc_scale=2, num_expansion=1)
    checkpoint = dict(model=dict(state), args=args, ema_model=state)
    del checkpoint['model'][NORM]
    assert str(from_official(checkpoint).schedule) == 'H2L2-(2+1)x1'
    averaged = from_official(checkpoint, schedule='H2L2-(2+1)x1', ema=True)
    assert 'decoder.norm.weight' in averaged.state_dict
    with pytest.raises(ValueError, match=r'enc_scale=2, which is H2L2-\(2\+1\)x1'):
        from_official(checkpoint, schedule='H3L1-(2+1)x1')
    checkpoint['args'].enc_scale = 1
    with pytest.warns(UserWarning, match='H2L2, which is enc_scale=2'):
        assert str(from_official(checkpoint, ema=True).schedule) == 'H1L3-(2+1)x1'
