"""Label-free training from a stock detector, for every family."""

import copy
import json

import numpy as np
import pytest
import torch
from commands import invoke, mmlite, refused
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from small_detectors import STOCK, batch, small_config, small_model, write_pair

from mmlite.datasets import generate_shapes
from mmlite.openmmlab.distillation import (
    DistilledDetector,
    _output_distances,
    _score_distance,
    distillation_config,
    images_without_labels,
)
from mmlite.openmmlab.families import encoder_name
from mmlite.openmmlab.lite_config import lite_change, main_schedule

TEXT = ('GroundingDINO', 'MM-GroundingDINO')
FAMILIES = ['plain', 'two-stage', 'DINO', 'DDQ', 'GroundingDINO', 'Mask2Former', 'panoptic']


def teacher_file(folder, name: str, bert: str = ''):
    """Weights of a small stock detector, and the Lite config of it."""
    torch.save(
        {'state_dict': small_model(name, bert=bert, std=0.1).state_dict()}, folder / 'stock.pth'
    )
    config = small_config(name, bert)
    config.merge_from_dict({'model': lite_change(config.model, main_schedule(config.model))})
    return config, str(folder / 'stock.pth')


@pytest.mark.parametrize('name', FAMILIES)
def test_a_training_step_of_every_family(name, tmp_path, tiny_bert):
    config, teacher = teacher_file(tmp_path, name, tiny_bert if name in TEXT else '')
    torch.manual_seed(0)
    model = DistilledDetector(config.model, teacher)
    data = batch(model.student)
    data['data_samples'] = [sample.new(metainfo=sample.metainfo) for sample in data['data_samples']]
    model.start(data)
    model.train()
    before = copy.deepcopy(model.teacher.state_dict())
    losses = model(**data, mode='loss')
    expected = {'loss_tokens', 'loss_classes', 'loss_boxes'}
    two_stages = getattr(model.student, 'as_two_stage', False)
    assert set(losses) == expected | ({'loss_proposals'} if two_stages else set())
    # With random weights the scores of a text are all zero.
    assert all(value.isfinite() for value in losses.values())
    assert losses['loss_tokens'] > 0 and losses['loss_boxes'] > 0
    sum(losses.values()).backward()
    encoder = encoder_name(model.student)
    for parameter_name, parameter in model.student.named_parameters():
        trained = parameter_name.startswith(f'{encoder}.')
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.isfinite().all())) == trained
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert not any('teacher' in key or 'student' in key for key in model.state_dict())
    lite = MODELS.build(config.model)
    lite.load_state_dict(model.state_dict())
    again = DistilledDetector(config.model, teacher)
    again.load_state_dict(lite.state_dict())
    for key, value in model.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[key], value), key


def test_a_student_like_its_teacher_has_no_loss(tmp_path):
    """With the stock schedule and attention, and all weights copied, nothing is to be learnt."""
    config, teacher = teacher_file(tmp_path, 'DINO')
    config.model.encoder.update(schedule='H4L0-1234x2', key_aware=False)
    model = DistilledDetector(config.model, teacher)
    data = batch(model.student)
    model.start(data)
    losses = model.train()(**data, mode='loss')
    assert all(abs(float(value)) < 1e-5 for value in losses.values())


def test_score_distance_by_hand():
    wanted = torch.tensor([[0.0, -torch.inf]])  # a half, and a word that is not there
    found = torch.tensor([[torch.log(torch.tensor(3.0)), 5.0]])  # three quarters
    divergence = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    absent = np.log1p(np.exp(5.0))
    assert float(_score_distance(found, wanted)) == pytest.approx((divergence + absent) / 0.5)
    assert float(_score_distance(wanted, wanted)) == 0


def test_boxes_weigh_as_the_teacher_is_sure():
    scores, wanted = torch.zeros(1, 1, 2, 1), torch.tensor([3.0, -3.0]).view(1, 1, 2, 1)
    boxes, wanted_boxes = torch.zeros(1, 1, 2, 4), torch.tensor([0.1, 0.5]).view(1, 1, 2, 1)
    p = wanted.sigmoid().flatten()
    expected = 4 * (p[0] * 0.1 + p[1] * 0.5) / p.sum()
    found = _output_distances((scores, boxes), (wanted, wanted_boxes.expand(1, 1, 2, 4)))
    torch.testing.assert_close(found['boxes'], expected)


def test_the_decoder_of_a_student_gets_its_teacher_s_queries(tmp_path):
    config, teacher = teacher_file(tmp_path, 'two-stage')
    model = DistilledDetector(config.model, teacher)
    data = batch(model.student)
    model.start(data)
    points, memories = [], []

    def keep(module, args, kwargs):
        points.append(kwargs['reference_points'])
        memories.append(kwargs['value'])

    for decoder in (model.teacher.decoder, model.student.decoder):
        decoder.register_forward_pre_hook(keep, with_kwargs=True)
    model.train()(**data, mode='loss')
    assert torch.equal(*points) and not torch.equal(*memories)
    model.eval()(**data, mode='predict')
    assert not torch.equal(points[1], points[2])


@pytest.fixture(scope='module')
def user(tmp_path_factory):
    """A stock detector for drawn shapes, its weights, its Lite config and images."""
    folder = tmp_path_factory.mktemp('user')
    generate_shapes(folder / 'shapes', {'train': 4, 'val': 2})
    classes = {'classes': ('disc', 'ring', 'triangle', 'cross')}
    changes = {
        'model.bbox_head.num_classes': 4,
        'test_dataloader.dataset.metainfo': classes,
        'test_dataloader.dataset.pipeline': [
            {'type': 'LoadImageFromFile'},
            {'type': 'Resize', 'scale': (64, 64), 'keep_ratio': True},
            {'type': 'LoadAnnotations', 'with_bbox': True},
            {
                'type': 'PackDetInputs',
                'meta_keys': ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
            },
        ],
        'train_dataloader.num_workers': 0,
        'train_dataloader.dataset.pipeline': [],
    }
    stock, lite = write_pair(folder, 'DINO', **changes)
    model = MODELS.build(Config.fromfile(stock).model)
    model.init_weights()  # MMDetection leaves an embedding as the memory was
    torch.save(model.state_dict(), folder / 'stock.pth')
    return folder, lite


def images_of(folder) -> list:
    return sorted((folder / 'shapes/train').iterdir())


def test_images_are_read_as_in_training(user):
    config, images = small_config('DINO'), images_of(user[0])
    whole = images_without_labels(config, images, training=True)
    steps = whole['pipeline']
    assert [step['type'] for step in steps] == [
        'LoadImageFromFile',
        'RandomChoiceResize',
        'RandomFlip',
        'PackDetInputs',
    ]
    assert len(steps[1]['scales']) == 11  # MMDetection's eleven sizes of training
    tested = [step['type'] for step in images_without_labels(config, images)['pipeline']]
    assert tested == ['LoadImageFromFile', 'Resize', 'PackDetInputs']
    dataset = DATASETS.build(whole)
    assert len(dataset) == 4
    item = dataset[3]
    assert item['inputs'].shape[0] == 3 and not len(item['data_samples'].gt_instances)


def test_runs_resumes_and_says_what_it_is(user, tmp_path):
    folder, lite = user
    config, teacher, images = Config.fromfile(lite), str(folder / 'stock.pth'), images_of(folder)
    config.log_level = 'ERROR'

    def trained(iterations: int) -> dict:
        settings = distillation_config(config, teacher, images, 4, 2, tmp_path / 'work')
        assert not settings.find_unused_parameters
        settings.default_hooks.checkpoint.interval = 2
        settings.train_cfg.max_iters = iterations
        Runner.from_cfg(Config(settings.to_dict())).train()
        return torch.load(tmp_path / f'work/iter_{iterations}.pth', weights_only=False)

    first = trained(2)
    facts = {'teacher': teacher, 'images': 4, 'schedules': ['H3L1-(2+1)x1']}
    assert first['meta']['distilled'] == {**facts, 'iterations': 2}
    last = trained(4)
    assert last['meta']['distilled']['iterations'] == 4
    lite = MODELS.build(config.model)
    lite.load_state_dict(last['state_dict'])
    stock = torch.load(teacher)
    for name, value in last['state_dict'].items():
        if not name.startswith('encoder.'):
            assert torch.equal(value, stock[name]), name
    changed = [
        n for n, v in last['state_dict'].items() if not torch.equal(v, first['state_dict'][n])
    ]
    assert changed and all(name.startswith('encoder.') for name in changed)


def test_elastic_students_are_fitted_and_learn_three_schedules_at_a_time(tmp_path):
    schedules = ['H3L1-(2+1)x1', 'H3L1-(1+1)x2', 'H4L0-1234x2']
    config, teacher = teacher_file(tmp_path, 'DINO')
    config.model.encoder.update(schedule=schedules[0], elastic=schedules)
    assert distillation_config(config, teacher, []).find_unused_parameters
    model = DistilledDetector(config.model, teacher)
    data = batch(model.student)
    before = [model.encoder.layers[i].small_ffn.layers[1].weight.clone() for i in (0, 1)]
    model.start(data)
    for layer, old in zip(model.encoder.layers, before):  # the first is low in one schedule alone
        assert not torch.equal(layer.small_ffn.layers[1].weight, old)
    used = []
    hook = lambda module, args, kwargs: used.append(str(module.next_schedule))  # noqa: E731
    model.encoder.register_forward_pre_hook(hook, with_kwargs=True)
    model.train()
    teacher_calls = []
    model.teacher.encoder.register_forward_pre_hook(lambda *_: teacher_calls.append(1))
    losses = model(**data, mode='loss')
    assert used == [schedules[1], schedules[0], schedules[2]] and len(teacher_calls) == 1
    assert model.iterations == 1
    alone = []
    for schedule in schedules:
        config.model.encoder.schedule, config.model.encoder.elastic = schedule, []
        single = DistilledDetector(config.model, teacher)
        single.student.load_state_dict(model.student.state_dict(), strict=False)
        alone.append(single.train()(**data, mode='loss'))
    for name, value in losses.items():
        torch.testing.assert_close(value, sum(loss[name] for loss in alone) / 3)
    model.eval()(**data, mode='predict')
    assert used[3] == schedules[0]


def test_a_student_that_reads_some_maps_is_fitted(tmp_path):
    config, teacher = teacher_file(tmp_path, 'DINO')
    config.model.encoder.schedule = 'H4L0-12:12+1234'
    model = DistilledDetector(config.model, teacher)
    report = model.start(batch(model.student))
    assert report.result.memory < report.copied_only.memory


def test_wrong_teachers_are_refused(tmp_path):
    assert set(FAMILIES) <= set(STOCK)
    config, _ = teacher_file(tmp_path, 'DINO')
    torch.save(small_model('plain').state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='the weights are not those of the DINO behind'):
        DistilledDetector(config.model, str(tmp_path / 'other.pth'))
    stock = small_config('DINO').model
    with pytest.raises(ValueError, match='VIS reads videos, not images'):
        images_without_labels(Config({'model': {'type': 'VIS', 'track_head': {}}}), [])
    with pytest.raises(ValueError, match='no Lite detector'):
        DistilledDetector(stock, str(tmp_path / 'stock.pth'))


def convert(folder, lite, target, *options) -> list:
    """The words of the command."""
    words = ['convert', folder / 'stock.pth', target, '--from-stock', lite]
    return [*words, '--images', folder / 'shapes/train', '--batch-size', 2, *options]


def test_the_command_trains_measures_and_leaves_a_lite_checkpoint(user, tmp_path):
    folder, lite = user
    annotations = folder / 'shapes/annotations/instances_val.json'
    measured = ('--annotations', annotations, '--annotated-images', folder / 'shapes/val')
    report = tmp_path / 'report.json'
    options = ('--iterations', 4, *measured, '--json', report)
    output = mmlite(*convert(folder, lite, tmp_path / 'lite.pth', *options))
    for line in ('stock detector: ', 'after 0 iterations: ', 'after 4 iterations: ', 'Wrote'):
        assert line in output
    assert len(json.loads(report.read_text())['ap']) == 6  # the teacher, the start, each quarter
    content = torch.load(tmp_path / 'lite.pth')
    facts = content['meta']['distilled']
    assert (facts['images'], facts['iterations']) == (4, 4)
    assert facts['teacher'].endswith('stock.pth') and facts['schedules'] == ['H3L1-(2+1)x1']
    MODELS.build(Config.fromfile(lite).model).load_state_dict(content['state_dict'])
    assert not (tmp_path / 'lite.distill').exists()


def test_the_command_goes_on_and_refuses_another_conversion(user, tmp_path, monkeypatch):
    folder, lite = user
    target, work = tmp_path / 'lite.pth', tmp_path / 'lite.distill'
    stopped = Runner.train

    def stop(runner):
        stopped(runner)
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, 'train', stop)
    assert invoke(*convert(folder, lite, target, '--iterations', 2)).exit_code
    assert work.is_dir() and not target.exists()
    another = convert(folder, lite, target, '--iterations', 3)
    refused('holds a conversion that stopped', *another)
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(DistilledDetector, 'start', lambda *_: seen.append(1))
    mmlite(*convert(folder, lite, target, '--iterations', 2))
    assert target.exists() and not seen  # what was done was not done again


@pytest.mark.parametrize(
    ('options', 'problem'),
    [
        (['--iterations', 2, '--annotations', 'a.json'], 'go together'),
        (['--iterations', 2, '--ema'], 'takes none of'),
        (['--iterations', 2, '--cfg-options', 'model.bbox_head.num_classes=3'], 'other classes'),
        (['--iterations', 2, '--schedule', 'H3L1-(2+1)x9'], 'makes 18 layers'),
        (['--images', 'none.png'], 'none.png.* does not exist'),
    ],
)
def test_bad_options_are_refused_before_any_work(user, tmp_path, options, problem):
    refused(problem, *convert(*user, tmp_path / 'lite.pth', *options))
    assert not (tmp_path / 'lite.pth').exists()
