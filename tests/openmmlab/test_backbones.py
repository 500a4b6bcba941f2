"""Backbones of timm: their maps, weights, frozen stages, and configs with one."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from small_detectors import batch, small_config, without_gradient

from mmlite.openmmlab.lite_config import backbone_change, lite_config, main_schedule

try:
    import timm
except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch
    pytest.skip(f'timm cannot be imported: {error}', allow_module_level=True)


def build(name='tf_efficientnet_lite0', out_indices=(2, 3, 4), **options):
    return MODELS.build(
        dict(type='TimmBackbone', model_name=name, out_indices=out_indices, **options)
    )


@pytest.mark.parametrize('rename', ['{}', 'their.{}'])
def test_weights_are_those_of_the_file_and_stay(rename, tmp_path):
    whole = timm.create_model('tf_efficientnet_lite0')
    state = {rename.format(name): value for name, value in whole.state_dict().items()}
    torch.save(state, tmp_path / 'weights.pth')
    backbone = build(checkpoint=str(tmp_path / 'weights.pth')).eval()
    backbone.init_weights()
    image, maps = torch.randn(1, 3, 64, 96), []
    whole.blocks[6].register_forward_hook(lambda module, inputs, output: maps.append(output))
    whole.eval()(image)
    assert torch.equal(backbone(image)[-1], maps[0])
    with pytest.raises(ValueError, match='not those of resnet18'):
        build('resnet18', checkpoint=str(tmp_path / 'weights.pth'))


@pytest.mark.parametrize(
    ('name', 'options', 'last_frozen', 'first_free'),
    [
        ('resnet18', {}, 'model.layer1.1.bn2.bias', 'model.layer2.0.conv1.weight'),
        ('vit_tiny_patch16_224', dict(dynamic_img_size=True), 'model.model.blocks.1', ''),
        ('swin_tiny_patch4_window7_224', dict(img_size=(64, 96)), 'model.layers_1', ''),
    ],
)
def test_maps_and_frozen_stages(name, options, last_frozen, first_free):
    backbone = build(name, (0, 1, 2), frozen_stages=1, norm_eval=name == 'resnet18', **options)
    backbone.train()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == backbone.channels
    assert all(m.shape[2] < m.shape[3] for m in maps)
    frozen, free = [], []
    for parameter, value in backbone.named_parameters():
        (free if value.requires_grad else frozen).append(parameter)
    assert frozen[-1].startswith(last_frozen)
    assert free[0].startswith(first_free)
    assert not any(m.training for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert backbone.training


def test_refusals():
    with pytest.raises(ValueError, match='maps'):
        build('resnet18', (0, 9))
    with pytest.raises(ValueError, match='Unknown model'):
        build('resnet1818')


@pytest.mark.parametrize(('name', 'strides'), [('DINO', r'\[8, 16'), ('Mask2Former', r'\[4, 8')])
def test_a_config_with_another_backbone(name, strides, tmp_path):
    config = small_config(name)
    changes = backbone_change(config.model, 'tf_efficientnet_lite0')
    stock, lite = tmp_path / 'stock.py', tmp_path / 'lite.py'
    config.dump(stock)
    lite.write_text(lite_config(config, stock, main_schedule(config.model), changes))
    model = MODELS.build(Config.fromfile(lite).model)
    assert model.data_preprocessor.mean.flatten().tolist() == [127.5] * 3
    assert not without_gradient(model, batch(model))
    with pytest.raises(ValueError, match=rf'strides \[16\]; the .* takes {strides}'):
        backbone_change(config.model, 'vit_tiny_patch16_224')
