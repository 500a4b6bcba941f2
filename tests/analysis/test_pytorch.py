"""``mmlite benchmark compare`` of any PyTorch model, and of those of transformers."""

import json
from pathlib import Path

import pytest
from commands import mmlite, refused

MINE = """
import torch
from other_repositories import SigmoidAttn, build, inputs

def mine():
    model = build('by_name')
    return model, inputs(model)

def by_size():  # one image of three levels, by name
    model = build('by_name', sizes=[(4, 6), (2, 3), (1, 2)])
    names = 'src', 'pos', 'mask', 'ratios'
    def make(image_size, batch_size):
        assert image_size == (8, 9)
        return dict(zip(names, (each[:batch_size] for each in inputs(model)[:4])), text={})
    return model, make

def own_forward():
    model = build('by_name')
    model.encoder.forward = model.encoder.forward
    return model, inputs(model)

def alone():
    return build().eval()

def unfit():
    return build('by_name'), (torch.ones(2),)

def needs(args):
    return build()

def one():
    return build(), lambda size: None

def another():
    model = build(attention=SigmoidAttn)
    return model, inputs(model)

def plain():
    return torch.nn.Linear(1, 1), {'input': torch.ones(1, 1)}
"""


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text(MINE)
    Path('broken.py').write_text('import nowhere')


COMPARE = ('benchmark', 'compare', '--framework')


def compare(*words) -> tuple[str, list[dict]]:
    """What a command prints, and its results."""
    output = mmlite(*COMPARE, *words, '--json', 'report.json')
    return output, json.loads(Path('report.json').read_text())['results']


QUICK = ('--rounds', '2', '--warmup', '1', '--part', 'inference', '--part', 'encoder')


def check_group(stock, fused, *lites) -> None:
    """Costs and times of a model and its variants."""
    costs = [each['complexity'] for each in (stock, fused, *lites)]
    assert costs[0] == costs[1]
    for each, cost in zip(lites, costs[2:]):
        assert 0 < cost['stage_flops']['encoder'] < costs[0]['stage_flops']['encoder']
        assert cost['flops'] < costs[0]['flops'] and each['name'].startswith(stock['name'])
    for each in (stock, fused, *lites):
        assert list(each['timings']) == ['inference', 'encoder']
        for timing in (part['1'] for part in each['timings'].values()):
            assert len(timing['seconds']) == 2
            assert (timing['faster']['faster']['median'] == 1) == (each is stock)
            ours = timing['faster']['faster than stock, our op']['median']
            assert (ours == 1) == (each is fused)


def test_a_model_of_any_repository():
    output, found = compare('pytorch', 'mine.py:mine', *QUICK)
    names = ['', ', fused', ', Lite H3L1-(2+1)x2']  # four layers over four levels
    assert [each['name'] for each in found] == [f'mine.py:mine{name}' for name in names]
    check_group(*found)
    assert found[0]['complexity']['level_tokens'] == [48, 12, 6, 2]
    assert 'Inference, the given inputs, float32, cpu' in output

    schedules = ('--schedule', 'H2L1-(2+1)x2', '--schedule', 'H1L2-(4+1)x1')
    output, found = compare(
        'pytorch', 'mine.py:by_size', *QUICK, *schedules, '--image-size', '8', '9'
    )
    assert [each['name'] for each in found][2:] == [
        f'mine.py:by_size, Lite {schedule}' for schedule in schedules[1::2]
    ]
    check_group(*found)
    assert 'Encoder, 8x9, batch 1, float32, cpu' in output

    output, found = compare('pytorch', 'mine.py:own_forward', '--count-only')
    assert [each['name'] for each in found] == [f'mine.py:own_forward{x}' for x in ('', ', fused')]
    assert 'Lite: Model has no encoder that the Lite encoder can replace' in output


@pytest.mark.parametrize('name', ['deformable-detr', 'grounding-dino', 'mask2former'])
def test_a_model_of_transformers(monkeypatch, name):
    small = pytest.importorskip('transformers_models')
    import transformers as hf

    from mmlite.analysis import huggingface

    config = getattr(small, name.replace('-', '_'))().config
    kind = getattr(hf, huggingface.MODELS[name].args[0])
    assert kind.config_class is type(config)
    monkeypatch.setattr(kind, 'config_class', lambda **backbone: config)
    _, found = compare('transformers', name, *QUICK, '--image-size', '64', '96')
    levels = 'H2L1' if name == 'mask2former' else 'H3L1'
    assert found[2]['name'] == f'{name}, Lite {levels}-(2+1)x2'
    check_group(*found)


@pytest.mark.parametrize(
    ('framework', 'arguments', 'problem'),
    [
        ('pytorch', 'mine.py', "'mine.py' names no function; write FILE.py:FUNCTION"),
        ('pytorch', 'none.py:mine', 'none.py does not exist'),
        ('pytorch', 'broken.py:mine', "cannot be imported: .* No module named 'nowhere'"),
        ('pytorch', 'mine.py:yours', 'mine.py has no function yours'),
        ('pytorch', 'mine.py:mine mine.py:alone', 'give one FILE.py:FUNCTION'),
        ('pytorch', 'mine.py:alone', r'must return \(model, inputs\).* it returned Model'),
        ('pytorch', 'mine.py:unfit', 'mine.py:unfit does not run on its inputs'),
        ('pytorch', 'mine.py:needs', 'needs in mine.py needs arguments; write a function that'),
        ('pytorch', 'mine.py:one', 'must take an image size and a batch size'),
        ('pytorch', 'mine.py:plain', 'Linear has no deformable attention'),
        ('pytorch', 'mine.py:another', 'Model has no deformable attention that mmlite.ops can'),
        ('pytorch', 'mine.py:mine --schedule H3L1-(2+1)x9', 'x9'),
        ('pytorch', 'mine.py:mine --batch-size 2', 'leave out --batch-size, or return a function'),
        ('pytorch', 'mine.py:mine --train', 'leave out .*--train'),
        ('transformers', 'yolo', "'yolo' is none of the models: deformable-detr"),
        ('transformers', '--cfg-options a=1', 'leave out .*--cfg-options'),
        ('transformers', '--preset paper-table3', 'leave out --preset'),
        ('transformers', '--runtime onnxruntime', 'leave out .*--runtime'),
    ],
)
def test_what_does_not_fit_is_one_sentence(framework, arguments, problem):
    refused(problem, *COMPARE, framework, *arguments.split())
