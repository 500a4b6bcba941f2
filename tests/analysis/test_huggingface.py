import json
import re

import pytest
from click.testing import CliRunner

transformers_models = pytest.importorskip('transformers_models')
from mmlite.analysis import huggingface  # noqa: E402  (loads transformers)
from mmlite.cli import main  # noqa: E402

SMALL = {
    'deformable-detr': (transformers_models.deformable_detr, 'H3L1-(2+1)x2'),
    'grounding-dino': (transformers_models.grounding_dino, 'H3L1-(2+1)x2'),
    'mask2former': (transformers_models.mask2former, 'H2L1-(2+1)x2'),
}


def test_stock_fused_and_lite(tmp_path, monkeypatch):
    kinds = {one.title: SMALL[name] for name, one in huggingface.MODELS.items()}
    monkeypatch.setattr(huggingface.Kind, 'build', lambda self: kinds[self.title][0]())
    for name, (_, schedule) in SMALL.items():
        small = huggingface.MODELS[name]._replace(schedule=schedule)
        monkeypatch.setitem(huggingface.MODELS, name, small)
    path = tmp_path / 'transformers.json'
    options = ('--rounds', '2', '--warmup', '1', '--part', 'inference', '--part', 'encoder')
    command = ['benchmark', 'compare', '--framework', 'transformers', '--image-size', '64x96']
    result = CliRunner().invoke(main, [*command, *options, '--json', str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())['results']
    for title, stock, fused, lite in zip(kinds, found[::3], found[1::3], found[2::3]):
        assert (stock['name'], fused['name']) == (title, f'{title}, fused')
        assert lite['name'] == f'{title}, Lite {kinds[title][1]}'
        encoders = [r['complexity']['stage_flops']['encoder'] for r in (stock, fused, lite)]
        assert encoders[0] == encoders[1] > encoders[2] > 0
        for each in (stock, fused, lite):
            for part in ('inference', 'encoder'):
                timing = each['timings'][part]['1']
                assert len(timing['seconds']) == 2
                assert (timing['faster']['faster']['median'] == 1) == (each is stock)


@pytest.mark.parametrize(
    ('options', 'problem'),
    [
        (['--framework', 'transformers', 'yolo'], "'yolo' is none of the models: deformable-detr"),
        (['--framework', 'transformers', '--cfg-options', 'a=1'], 'leave out .*--cfg-options'),
        (['--schedule', 'H3L1-(2+1)x3', 'lite.py'], '--schedule is for --framework transformers'),
    ],
)
def test_options_that_do_not_go_together(options, problem):
    result = CliRunner().invoke(main, ['benchmark', 'compare', *options])
    assert result.exit_code and re.search(problem, result.output)
