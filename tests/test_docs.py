import re
from pathlib import Path

from commands import mmlite
from mmdet.registry import MODELS
from mmengine.config import Config

from mmlite.cli.demo import TASKS
from mmlite.cli.shared import read_config

ROOT = Path(__file__).parents[1]
# What a block names that only the reader has: weights, and a model of their own.
READERS = re.compile(r"from_pretrained|\.pth'|\(model\b|load_lite")


def python_blocks(page: str) -> list[str]:
    return re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)


def test_blocks_run():
    """Each goes on where the one before it ended."""
    blocks = [block for block in python_blocks('docs/python.md') if not READERS.search(block)]
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)


def test_three_lines_of_config_give_a_lite_model():
    block = python_blocks('README.md')[0]
    assert python_blocks('docs/index.md')[0] == block
    config = Config.fromstring(block, '.py')
    assert str(MODELS.build(config.model).encoder.schedule) == 'H3L1-(2+1)x3'


def test_lines_of_python_detect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mmlite('demo', '--epochs', 1, '--train-images', 8, '--val-images', 6)
    epochs = read_config(f'mmlite::small/{TASKS["detection"][0]}.py').train_cfg.max_epochs
    Path('work_dirs/demo/epoch_1.pth').rename(f'work_dirs/demo/epoch_{epochs}.pth')

    found: dict = {}
    exec(python_blocks('README.md')[1], found)
    assert found['boxes'].shape == (len(found['scores']), 4)
    assert (found['scores'] >= 0.3).all()
