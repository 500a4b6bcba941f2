"""Conversion of the authors' checkpoints, by the verified mapping and the golden model."""

from __future__ import annotations

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
from mmdet.utils import register_all_modules
from mmengine.config import Config

import mmlite  # noqa: F401
from mmlite.openmmlab.checkpoints import (
    check_conversion,
    convert_encoder_state,
    from_official,
    official_config,
    to_official,
)
from mmlite.openmmlab.checkpoints.official import COCO_IDS

register_all_modules()

GOLDEN = 'lite_dino_d256_h3l1_2p1x3_decstd.npz'


@pytest.fixture(scope='module')
def golden_model(golden):
    """The golden model: its arrays, the checkpoint it would have been saved as, and its meta."""
    arrays, meta = golden(GOLDEN)
    state = {name[len('state.') :]: a for name, a in arrays.items() if name.startswith('state.')}
    return arrays, dict(model=state, args=Namespace(**meta)), meta


def build(text: str, conversion):
    """The detector of a written config with the conversion's weights, without a backbone."""
    config = Config.fromstring(text, '.py').model
    config.backbone.depth = 18  # the quickest to build
    model = MODELS.build(config)
    model.backbone = torch.nn.Identity()
    model.load_state_dict(conversion.state_dict, strict=True)
    return model.eval()


def data_samples(arrays):
    canvas = tuple(arrays['mask'].shape[-2:])
    sizes = zip(arrays['image_sizes'].tolist(), arrays['orig_sizes'].tolist())
    return [
        DetDataSample(
            metainfo=dict(
                img_shape=tuple(image),
                ori_shape=tuple(original),
                batch_input_shape=canvas,
                scale_factor=(image[1] / original[1], image[0] / original[0]),
            )
        )
        for image, original in sizes
    ]


@pytest.mark.parametrize('coco_classes', [True, False])
def test_golden_lite_dino(golden_model, coco_classes):
    arrays, checkpoint, meta = golden_model
    conversion = from_official(checkpoint, 'lite-dino', coco_classes=coco_classes)
    assert str(conversion.schedule) == meta['schedule']
    model = build(official_config(conversion, checkpoint['args']), conversion)
    rows = meta['coco_category_ids'] if coco_classes else list(range(91))
    samples = data_samples(arrays)
    with torch.no_grad():
        maps = model.neck(tuple(arrays[f'feat.{level}'] for level in range(3)))
        for level, found in enumerate(maps):
            torch.testing.assert_close(found, arrays[f'src.{level}'], atol=1e-4, rtol=0)
        encoder_inputs, decoder_inputs = model.pre_transformer(maps, samples)
        encoded = model.forward_encoder(**encoder_inputs)['memory']
        torch.testing.assert_close(encoded, arrays['memory'], atol=5e-4, rtol=0)
        # Behind the authors' own memory the agreement is closer.
        for memory, tolerance in ((arrays['memory'], 1e-4), (encoded, 5e-4)):
            inputs, _ = model.pre_decoder(
                memory,
                encoder_inputs['feat_mask'],
                encoder_inputs['spatial_shapes'],
                batch_data_samples=samples,
            )
            outputs = model.forward_decoder(**{**decoder_inputs, **inputs})
            logits, boxes = model.bbox_head(outputs['hidden_states'], outputs['references'])
            expected = arrays['pred_logits'][..., rows], arrays['pred_boxes']
            torch.testing.assert_close(logits, expected[0], atol=tolerance, rtol=0)
            torch.testing.assert_close(boxes, expected[1], atol=tolerance / 10, rtol=0)
        outputs = {key: outputs[key] for key in ('hidden_states', 'references')}
        results = model.bbox_head.predict(**outputs, batch_data_samples=samples, rescale=True)
    for image, result in enumerate(results):
        count = arrays['post.scores'].shape[1]
        height, width = arrays['orig_sizes'][image].tolist()
        scores, labels = result.scores[:count], result.labels[:count]
        torch.testing.assert_close(scores, arrays['post.scores'][image], atol=1e-4, rtol=0)
        assert torch.equal(torch.tensor(rows)[labels], arrays['post.labels'][image])
        # MMDetection clamps boxes to the image, the authors do not.
        expected = arrays['post.boxes'][image].clone()
        expected[:, 0::2] = expected[:, 0::2].clamp(0, width)
        expected[:, 1::2] = expected[:, 1::2].clamp(0, height)
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
    assert forgetful.filled
    again = from_official(
        dict(model=forgetful.state_dict, args=checkpoint['args']), coco_classes=coco_classes
    )
    assert_same(there.state_dict, again.state_dict)


@pytest.fixture(scope='module')
def schema():
    data = Path(__file__).parents[2] / 'data/golden'
    return json.loads((data / 'official_lite_dino_state_schema.json').read_text())


def random_state(shapes: dict, groups=()) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for group in groups:
        for name in group[1:]:
            if name in state:
                state[name] = state[group[0]]
    return state


def resnet_state() -> dict:
    """MMDetection's ResNet-50 under the authors' names."""
    backbone = MODELS.build(dict(type='ResNet', depth=50))
    return {
        f'backbone.0.body.{name}': value
        for name, value in backbone.state_dict().items()
        if not name.endswith('num_batches_tracked')
    }


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
def test_schema(schema, variant):
    """A full-size state dict with random values loads with nothing missing and nothing left."""
    shapes = dict(schema['state'])
    changes = schema['variants'].get(variant, {})
    shapes.update(changes.get('added', {}))
    shapes.update({name: shape for name, (_, shape) in changes.get('resized', {}).items()})
    for name in changes.get('removed', ()):
        del shapes[name]
    state = {**random_state(shapes, schema['shared_tensors']['groups']), **resnet_state()}
    schedule, encoder, key_aware_decoder = VARIANTS[variant]

    conversion = from_official(dict(model=state), schedule=schedule)
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


def shrunk(base: str, **changes) -> Config:
    """The model config of MMDetection's ``base`` in small, with the authors' neck."""
    config = Config.fromstring(f'_base_ = {base!r}', '.py')
    layers = dict(num_layers=2, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=64)))
    small = dict(
        num_queries=30,
        backbone=dict(depth=18, init_cfg=None),
        neck=dict(in_channels=[128, 256, 512], bias=True),
        encoder=layers,
        decoder=layers,
        test_cfg=dict(max_per_img=30),
    )
    for model in (small, changes):
        config.merge_from_dict(dict(model=model))
    return config.model


DEFORMABLE = 'mmdet::deformable_detr/deformable-detr{}_r50_16xb2-50e_coco.py'
H_DETR = str(Path(__file__).parents[3] / 'configs/h_deformable_detr/h-deformable-detr_{}.py')
DINO = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'
SWIN = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=24,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 3, 4],
        window_size=5,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[48, 96, 192]),
)
LITE = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x1', num_layers=2))
# Family -> the MMDetection models that its checkpoints become.
MODELS_OF = {
    'plain': ('deformable-detr', DEFORMABLE.format(''), {}),
    'refine': ('deformable-detr', DEFORMABLE.format('-refine'), {}),
    'two-stage': ('deformable-detr', DEFORMABLE.format('-refine-twostage'), {}),
    'h-detr': ('h-deformable-detr', H_DETR.format('r50_8xb2-12e_coco'), {}),
    'h-detr-swin': ('h-deformable-detr', H_DETR.format('r50_8xb2-12e_coco'), SWIN),
    'dino': ('dino', DINO, {}),
    'dino-swin': ('dino', DINO, SWIN),
    'lite-dino': ('lite-dino', DINO, LITE),
}


@pytest.fixture(scope='module')
def trained():
    """Build one of the models, with random values in every parameter and buffer."""

    @cache
    def make(name: str):
        family, base, changes = MODELS_OF[name]
        config = shrunk(base, **copy.deepcopy(changes))
        torch.manual_seed(0)
        model = MODELS.build(config)
        model.init_weights()
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.uniform_(0.1, 1)
        return family, config, model

    return make


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}


@pytest.mark.parametrize('name', MODELS_OF)
@pytest.mark.parametrize('coco_classes', [True, False])
def test_round_trip_from_mmdetection(trained, name, coco_classes):
    family, config, model = trained(name)
    schedule = 'H3L1-(2+1)x1' if family == 'lite-dino' else None
    there = to_official(model.state_dict(), family, coco_classes)
    assert len(there.state_dict['class_embed.0.weight']) == (91 if coco_classes else 80)
    checkpoint = dict(model={f'module.{k}': v for k, v in there.state_dict.items()})
    back = from_official(checkpoint, family, schedule, coco_classes)
    assert_same(without_counters(model.state_dict()), back.state_dict)

    text = official_config(back, num_queries=30)
    check_conversion(back, text)
    written = Config.fromstring(text, '.py').model
    for key in ('type', 'num_queries', 'with_box_refine', 'as_two_stage'):
        assert written[key] == config[key], key
    assert written.backbone.type == config.backbone.type


def spread(words: str) -> set[str]:
    """The words that a shell makes of braces."""
    names = words.split()
    while any('{' in name for name in names):
        parts = [re.split('[{}]', name, maxsplit=2) for name in names]
        names = [
            f'{first}{each}{rest[1] if rest else ""}'
            for first, *rest in parts
            for each in (rest[0].split(',') if rest else [''])
        ]
    return set(names)


def test_names_of_h_deformable_detr(trained):
    """The names that the authors' code gives, written out for two layers and four levels."""
    attention = '{sampling_offsets,attention_weights,value_proj,output_proj}'
    names = spread(
        'query_embed.weight transformer.level_embed '
        'transformer.{enc_output,enc_output_norm,pos_trans,pos_trans_norm}.{weight,bias} '
        'input_proj.{0,1,2,3}.{0,1}.{weight,bias} '
        '{,transformer.decoder.}class_embed.{0,1,2}.{weight,bias} '
        '{,transformer.decoder.}bbox_embed.{0,1,2}.layers.{0,1,2}.{weight,bias} '
        'transformer.{en,de}coder.layers.{0,1}.{norm1,norm2,linear1,linear2}.{weight,bias} '
        'transformer.decoder.layers.{0,1}.norm3.{weight,bias} '
        f'transformer.encoder.layers.{{0,1}}.self_attn.{attention}.{{weight,bias}} '
        f'transformer.decoder.layers.{{0,1}}.cross_attn.{attention}.{{weight,bias}} '
        'transformer.decoder.layers.{0,1}.self_attn.{in_proj_,out_proj.}{weight,bias}'
    )
    _, _, model = trained('h-detr')
    state = to_official(model.state_dict()).state_dict
    assert {name for name in state if not name.startswith('backbone.0.body.')} == names

    def same(official, mmdet):
        assert torch.equal(state[official], model.state_dict()[mmdet])

    # The authors number the decoder's norms by module: 1 cross-attention, 2 self-attention, 3 FFN.
    same('transformer.decoder.layers.1.norm2.weight', 'decoder.layers.1.norms.0.weight')
    same('transformer.decoder.layers.1.norm1.weight', 'decoder.layers.1.norms.1.weight')
    same('transformer.decoder.layers.1.norm3.weight', 'decoder.layers.1.norms.2.weight')
    same('query_embed.weight', 'query_embedding.weight')
    same('bbox_embed.2.layers.2.bias', 'bbox_head.reg_branches.2.4.bias')


def test_rows_of_classes(trained):
    _, _, model = trained('h-detr')
    official = to_official(model.state_dict()).state_dict
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
    _, _, model = trained('dino')
    official = to_official(model.state_dict()).state_dict
    encoder = model.bbox_head.cls_branches[2].weight
    assert torch.equal(official['transformer.enc_out_class_embed.weight'][1], encoder[0])
    assert len(official['label_enc.weight']) == 92
    assert COCO_IDS[11] == 13 and len(COCO_IDS) == 80


def test_swin_as_mmdetection_converts_it(trained):
    _, _, model = trained('h-detr-swin')
    prefix = 'backbone.0.body.'
    official = {
        name[len(prefix) :]: value
        for name, value in to_official(model.state_dict()).state_dict.items()
        if name.startswith(prefix)
    }
    assert 'layers.0.downsample.reduction.weight' in official
    expected = {k: v for k, v in model.state_dict().items() if k.startswith('backbone.')}
    assert_same(swin_converter(official), expected)


@pytest.mark.parametrize(
    'name', ['layers.0.linear3.weight', 'norm.weight', 'layers.0.norms.0.bias']
)
def test_an_encoder_with_foreign_names(name):
    with pytest.raises(ValueError, match='no place in the authors'):
        convert_encoder_state({name: torch.zeros(1)})


def test_missing_bias_is_filled(trained):
    _, _, model = trained('dino')
    state = {k: v for k, v in model.state_dict().items() if 'conv.bias' not in k}
    conversion = to_official(state)
    assert not conversion.state_dict['input_proj.3.0.bias'].any()
    assert 'input_proj.3.0.bias' in conversion.filled


def official_state(trained, name):
    return dict(to_official(trained(name)[2].state_dict()).state_dict)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('dino', dict(family='lite-dino'), 'is no Lite-DINO.*use --model dino'),
        ('h-detr', dict(family='deformable-detr'), 'use --model h-deformable-detr'),
        ('plain', dict(family='h-deformable-detr'), 'use --model deformable-detr'),
        ('dino', dict(schedule='H3L1-(2+1)x3'), 'DINO has no schedule.*--from-stock'),
        ('lite-dino', dict(), r'--schedule H3L1-\(2\+1\)x1 or H2L2-\(2\+1\)x1 or H1L3'),
        ('lite-dino', dict(schedule='H3L1-(1+1)x2'), r'does not fit.*which fits H3L1-\(2\+1\)x1'),
        ('lite-dino', dict(schedule='H3L2-(2+1)x1'), 'it has 4 levels'),
        ('lite-dino', dict(schedule='nonsense'), 'HxLy'),
        ('lite-dino', dict(ema=True), 'no ema_model'),
        ('plain', dict(family='yolo'), 'none of deformable-detr'),
    ],
)
def test_refuses_what_does_not_fit(trained, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_official(dict(model=official_state(trained, name)), **arguments)


@pytest.mark.parametrize('name', ['dino', 'lite-dino', 'h-detr', 'plain'])
def test_written_config_asks_for_no_more_than_there_is(trained, name):
    """A single class and few queries give fewer predictions than the stock config asks for."""
    state = official_state(trained, name)
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
    enough = official_config(
        from_official(official_state(trained, name), schedule=schedule), num_queries=30
    )
    assert 'test_cfg' not in enough.partition('model = ')[2]


def test_counters_of_batch_norms(trained):
    """A ResNet that was trained with BatchNorm carries them, each a number without dimensions."""
    name = 'backbone.0.body.bn1.num_batches_tracked'
    state = {**official_state(trained, 'dino'), name: torch.tensor(7)}
    conversion = from_official(state)
    check_conversion(conversion, official_config(conversion))
    assert 'count of batches' in conversion.reasons[name]
    assert_same(state, to_official(conversion.state_dict, left=conversion.left).state_dict)


def test_stored_arguments_decide_the_schedule(trained):
    state = official_state(trained, 'lite-dino')
    args = Namespace(enc_scale=2, num_expansion=1)
    checkpoint = dict(model=state, args=args, ema_model=state)
    assert str(from_official(checkpoint).schedule) == 'H2L2-(2+1)x1'
    assert str(from_official(checkpoint, schedule='H2L2-(2+1)x1', ema=True).schedule)
    with pytest.raises(ValueError, match=r'enc_scale=2, which is H2L2-\(2\+1\)x1'):
        from_official(checkpoint, schedule='H3L1-(2+1)x1')


def test_refuses_other_files(trained):
    state = official_state(trained, 'plain')
    with pytest.raises(
        ValueError, match=r'neck_of\.weight, extra have no place in Deformable DETR'
    ):
        from_official({**state, 'neck_of.weight': torch.ones(1), 'extra': torch.ones(1)})
    with pytest.raises(ValueError, match='layout already'):
        from_official(trained('plain')[2].state_dict())
    with pytest.raises(ValueError, match='layout already'):  # Mask2Former
        from_official({'panoptic_head.pixel_decoder.mask_feature.weight': torch.ones(1)})
    for name in ('query_map.weight', 'text_feat_map.weight'):  # DDQ, Grounding DINO: DINO and more
        with pytest.raises(ValueError, match='no Deformable DETR, H-Deformable-DETR, DINO or'):
            to_official({**trained('dino')[2].state_dict(), name: torch.ones(1)})
    with pytest.raises(ValueError, match='no transformer'):
        from_official(dict(weight=torch.ones(1)))
    with pytest.raises(ValueError, match='no state dict'):
        from_official(dict(model=3))
    with pytest.raises(ValueError, match='should repeat bbox_embed'):
        state = official_state(trained, 'refine')
        state['transformer.decoder.bbox_embed.0.layers.0.bias'] = torch.zeros(256)
        from_official(state)
    with pytest.raises(ValueError, match="MMDetection's layout"):
        to_official(state)
    with pytest.raises(ValueError, match=r'has 1530 queries.*--num-queries'):
        official_config(from_official(official_state(trained, 'h-detr')))
    with pytest.raises(ValueError, match=r'does not fit the DINO.*decoder\.norm\.weight'):
        state = official_state(trained, 'dino')
        del state['transformer.decoder.norm.weight']
        conversion = from_official(state)
        check_conversion(conversion, official_config(conversion))
