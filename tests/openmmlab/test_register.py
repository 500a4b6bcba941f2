from importlib.metadata import PackageNotFoundError

import pytest
from mmdet_tools import fresh

from mmlite.openmmlab import register as openmmlab

LITE = {'mmengine': '0.10.7', 'mmcv-lite': '2.1.0', 'mmdet': '3.3.0'}
FITTING = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'}
CONTINUATION = {'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1'}


@pytest.fixture
def installed(monkeypatch):
    """Sets which distributions the check finds."""

    def install(distributions):
        def version(name):
            found = {'torch': '2.3.0+cpu', **distributions}
            if name not in found:
                raise PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(openmmlab, 'version', version)

    return install


@pytest.mark.parametrize('distributions', [LITE, {**FITTING, 'torch': '2.1.2'}, CONTINUATION])
def test_accepts_both_families(installed, distributions):
    installed(distributions)
    openmmlab.require()


@pytest.mark.parametrize(
    ('name', 'found'),
    [('mmengine', '0.8.0'), ('mmcv', '1.7.2'), ('mmcv', '2.2.0'), ('mmdet', '2.28.2')],
)
def test_a_version_that_does_not_fit(installed, monkeypatch, name, found):
    monkeypatch.setattr(openmmlab, 'when_imported', lambda *_: None)
    installed({**FITTING, name: found})
    with pytest.raises(ImportError) as raised:
        openmmlab.require()
    text = str(raised.value)
    assert f'{name} is {found}' in text
    assert "'mmcv-lite>=2.0.0,<2.2' 'mmdet>=3.3,<3.4')" in text
    assert "'torch>=2.3' 'onedl-mmengine>=0.10,<1' 'onedl-mmcv" in text
    assert '\n' not in text
    with pytest.warns(UserWarning) as warned:
        openmmlab.register()
    assert [str(warning.message) for warning in warned] == [text]


def test_the_continuation_needs_a_later_pytorch(installed):
    installed({**CONTINUATION, 'torch': '2.2.2+cu121'})
    with pytest.raises(ImportError, match=r'torch is 2\.2\.2\+cu121'):
        openmmlab.require()


def test_a_missing_package_is_named_where_it_is_needed(installed, monkeypatch, recwarn):
    monkeypatch.setattr(openmmlab, 'when_imported', pytest.fail)
    installed({'mmengine': '0.10.7', 'mmcv': '2.1.0'})
    openmmlab.register()  # the operators work without it
    assert not recwarn.list
    with pytest.raises(ImportError, match='mmdet is not installed'):
        openmmlab.require()


@pytest.fixture
def unfit(tmp_path):
    """A folder that makes an installed mmdet look like an old one."""
    folder = tmp_path / 'mmdet-3.0.0.dist-info'
    folder.mkdir()
    (folder / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmdet\nVersion: 3.0.0\n')
    return tmp_path


@pytest.mark.parametrize('fits', [True, False])
def test_import_loads_nothing_of_the_stack(unfit, fits):
    output = fresh(
        'import mmlite, sys\n'
        "print('torch' in sys.modules)\n"
        'import mmlite.openmmlab, mmlite.nn, mmlite.ops\n'
        'assert mmlite.ops.backends()\n'
        "print({'cv2', 'mmcv', 'mmdet', 'mmengine'} & set(sys.modules))\n"
        "import mmdet.registry\nprint('mmdet.models' in sys.modules)\n",
        path='' if fits else unfit,
    )
    assert output[-3:] == ['False', 'set()', 'False']
    warning = 'mmlite does not fit the installed MMDetection (mmdet is 3.0.0)'
    assert (warning in '\n'.join(output)) != fits


def test_a_config_for_a_stack_that_does_not_fit_ends_in_the_advice(unfit):
    stock, *advice = fresh(
        """
from mmengine.config import Config
Config.fromstring("custom_imports = dict(imports=['mmlite'])", '.py')
from mmdet.registry import MODELS
print(MODELS.get('DINO').__module__, MODELS._locations)
for name in ('LiteDINO', 'LiteMSDeformAttnPixelDecoder'):
    try:
        MODELS.build(dict(type=name, num_queries=3))
    except ImportError as error:
        print(error)
""",
        path=unfit,
    )[-3:]
    assert stock == "mmdet.models.detectors.dino ['mmdet.models']"
    assert all('mmdet is 3.0.0' in each and 'pip install' in each for each in advice)


@pytest.mark.parametrize(
    'first',
    [
        'import mmlite',
        'import mmengine.runner',
        'import mmlite.openmmlab.build',
        'import mmdet.apis',
        "from mmdet.registry import MODELS; MODELS.get('DINO')",
    ],
)
def test_adds_to_the_stack_whichever_is_imported_first(first):
    output = fresh(f"""
{first}
import mmlite
from mmengine.runner import CheckpointLoader
from mmdet.registry import DATASETS, HOOKS, MODELS
print(CheckpointLoader._schemes[''].__module__)  # before any model is built
print(MODELS.get('LiteDINO').__module__)
print(type(HOOKS.build(dict(type='FusedAttentionHook'))).__name__)
print(DATASETS.get('CheckedCocoDataset').__name__)
""")
    assert output[-4:] == [
        'mmlite.openmmlab.register',
        'mmlite.openmmlab.detectors.dino',
        'FusedAttentionHook',
        'CheckedCocoDataset',
    ]


def test_building_lite_detectors_and_hooks_loads_nothing_heavy():
    """Beside what a stock detector loads: it has matplotlib itself."""
    output = fresh("""
import os, sys
import mmdet.models, mmdet.datasets, mmengine.analysis
from mmdet.registry import DATASETS, HOOKS, MODELS
from mmengine.config.utils import MODULE2PACKAGE
from mmdet.utils import register_all_modules
register_all_modules()
HOOKS.build(dict(type='NumClassCheckHook'))
before, packages, environment = set(sys.modules), dict(MODULE2PACKAGE), dict(os.environ)
import mmlite
from mmlite.openmmlab.families import FAMILIES
assert all(MODELS.get(family.lite) for family in FAMILIES)
HOOKS.build(dict(type='FusedAttentionHook'))
HOOKS.build(dict(type='SafeCheckpointHook', interval=1))
heavy = ('matplotlib', 'jinja2', 'onnx', 'openvino', 'mmlite.export', 'mmlite.analysis')
loaded = [name for name in set(sys.modules) - before if name.startswith(heavy)]
print(loaded, environment == dict(os.environ) and packages == MODULE2PACKAGE)
HOOKS.build(dict(type='EfficiencyHook'))
print('mmlite.analysis.hooks' in sys.modules and 'mmlite.analysis.pictures' not in sys.modules)
""")
    assert output[-2:] == ['[] True', 'True']


def test_takes_no_name_of_the_stack():
    """The registries hold what they held, under every name, once somebody asks for a model."""
    output = fresh("""
import mmdet.registry as registry, sys
def snapshot():
    names = ('DATASETS', 'HOOKS', 'MODELS', 'TRANSFORMS', 'METRICS', 'TASK_UTILS')
    kinds = [getattr(registry, name) for name in names]
    kinds += [kind.parent for kind in kinds]
    for kind in kinds: kind.import_from_location()
    return [dict(kind._module_dict) for kind in kinds]
before = snapshot()
import mmlite
after = snapshot()
print(all(b.items() <= a.items() for b, a in zip(before, after)), 'LiteDINO' in registry.MODELS)
""")
    assert output[-1] == 'True True'
