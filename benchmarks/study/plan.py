"""Plans of a study: which rows are trained on which data with which seeds."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from mmlite.analysis.accuracy import METRICS
from mmlite.datasets import STYLES
from mmlite.openmmlab.build import load_config

from . import details  # noqa: F401  (a style to draw)

# Plans that ship, beside the configs that they name.
SHIPPED = Path(__file__).parent / 'configs'

_PLAN_KEYS = ('name', 'title', 'baseline', 'metric', 'margin', 'seeds')
_PLAN_KEYS += ('data', 'rows', 'first', 'set')
_DATA_KEYS = ('title', 'root', 'draw', 'config', 'set')
_ROW_KEYS = ('config', 'set', 'data', 'warm_start', 'convert', 'evaluate')
_CONVERT_KEYS = ('teacher', 'iterations', 'batch_size')
_FIRST_KEYS = ('data', 'rows')
_SPLITS = ('train', 'val', 'test')


@dataclass(frozen=True, eq=False)  # of itself, so that it can be a key
class Data:
    """A data set of a plan."""

    name: str
    title: str
    root: Path | None = None  # folder with annotations/ and images; None: it is drawn
    draw: Mapping[str, Any] | None = None  # style, train, val, image_size, seed
    config: str | None = None  # what is trained on it, where a row does not say otherwise
    set: Mapping[str, Any] = field(default_factory=dict)  # overrides of that config


@dataclass(frozen=True, eq=False)  # of itself, so that it can be a key
class Row:
    """A line of the tables: a way of building the detector."""

    name: str
    config: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[str] = ()  # the data sets that it is run on; none: all
    warm_start: str | None = None  # the row whose trained weights it starts from
    convert: Mapping[str, Any] | None = None  # teacher (a row), iterations, batch_size: no labels
    evaluate: str | None = None  # the row whose weights it takes as they are

    @property
    def source(self) -> str | None:
        """The row whose weights it needs."""
        return self.warm_start or (self.convert or {}).get('teacher') or self.evaluate


@dataclass(frozen=True)
class Run:
    """One training: a row on a data set with a seed."""

    data: Data
    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f'{self.data.name}/{slug(self.row.name)}/seed{self.seed}'

    @property
    def title(self) -> str:
        return f'{self.data.name}, {self.row.name}, seed {self.seed}'


@dataclass(frozen=True)
class Plan:
    """What a study runs; :func:`read_plan` reads one."""

    name: str
    title: str
    path: Path
    baseline: str
    metric: str
    margin: float | None  # percent of the baseline's metric within which a row is equivalent
    seeds: Sequence[int]
    data: Mapping[str, Data]
    rows: Mapping[str, Row]
    first: Sequence[Mapping[str, Sequence[str]]] = ()  # what is run before the rest
    set: Mapping[str, Any] = field(default_factory=dict)  # overrides of every config
    _read: dict[str, Config] = field(default_factory=dict)  # by reference

    @cached_property
    def runs(self) -> list[Run]:
        """All runs in the order in which they start: seed by seed, so that rows can be compared
        early."""
        return list(dict.fromkeys(self._runs()))

    def _runs(self) -> Iterator[Run]:
        everything = {'data': list(self.data), 'rows': list(self.rows)}
        for group in [*self.first, everything]:
            for data in group.get('data', self.data):
                for seed in self.seeds:
                    for row in group.get('rows', self.rows):
                        if data in (self.rows[row].data or self.data):
                            yield Run(self.data[data], self.rows[row], seed)

    def config_reference(self, run: Run) -> str:
        """The config of a run, as for :func:`mmlite.openmmlab.build.load_config`."""
        return run.row.config or run.data.config

    def config(self, run: Run) -> Config:
        """The config of a run with its overrides, before it is told where its data lies.

        Raises:
            FileNotFoundError: There is no such config.
            ValueError: It cannot be read, or an override does not fit it.
        """
        reference = self.config_reference(run)
        if '::' not in reference:
            reference = str(self.path.parent / reference)
        if reference not in self._read:
            self._read[reference] = load_config(reference)
        config = copy.deepcopy(self._read[reference])
        for overrides in (self.set, run.data.set, run.row.set):
            try:
                config.merge_from_dict(_plain(overrides))
            except (TypeError, KeyError, IndexError) as error:
                raise ValueError(
                    f'plan {self.path}: the overrides of {run.title} do not fit '
                    f'{reference}: {error}'
                ) from error
        if run.row.convert:
            config.convert = _plain(run.row.convert)
        return config


def fingerprint(config: Config) -> str:
    """Tells whether two runs were made with the same config, wherever their data lay."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_plan(
    reference: str, roots: Mapping[str, Path] | None = None, seeds: Sequence[int] = ()
) -> Plan:
    """Read and check a plan.

    Args:
        reference (str): A YAML file, or the name of a plan that ships.
        roots (Mapping[str, Path], optional): Folders of data sets, instead of the plan's.
        seeds (Sequence[int]): Seeds instead of the plan's.

    Returns:
        Plan: The plan; no config of it has been read yet, and no data set looked for.

    Raises:
        FileNotFoundError: There is no such plan.
        ValueError: It is no YAML, or says something that a plan cannot say.
    """
    path = Path(reference)
    if not path.is_file():
        path = SHIPPED / f'{reference}.yaml'
    if not path.is_file():
        shipped = ', '.join(sorted(plan.stem for plan in SHIPPED.glob('*.yaml')))
        raise FileNotFoundError(f'plan {reference} does not exist; these ship: {shipped}')
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'plan {path} is no YAML: {" ".join(str(error).split())}') from error
    try:
        return _plan(path, content, roots or {}, seeds)
    except _PlanError as error:
        raise ValueError(f'plan {path}: {error}') from error


class _PlanError(ValueError):
    pass


def _plan(path: Path, content: Any, roots: Mapping[str, Path], seeds: Sequence[int]) -> Plan:
    content = _entries('the plan', content, _PLAN_KEYS, needed=('baseline', 'data', 'rows'))
    data = {str(name): _data(str(name), entry) for name, entry in _named(content, 'data')}
    for name, root in roots.items():
        if name not in data or data[name].root is None:
            found = ', '.join(name for name, one in data.items() if one.root) or 'none'
            raise _PlanError(f'a folder is given for {name}, but those that take one are: {found}')
        data[name] = Data(**{**vars(data[name]), 'root': root})
    rows = {
        str(name): Row(str(name), **_entries(f'row {name}', entry or {}, _ROW_KEYS))
        for name, entry in _named(content, 'rows')
    }
    slugs = {slug(name) for name in rows}
    if len(slugs) < len(rows):
        raise _PlanError('two rows have names that differ in punctuation alone')
    for row in rows.values():
        if row.convert is not None:
            _entries(f'convert of {row.name}', row.convert, _CONVERT_KEYS, needed=_CONVERT_KEYS)
        for name in row.data:
            _known('data set', name, data)
        if row.source is not None:
            _known('row', row.source, rows)
            before = rows[row.source]
            if before.evaluate or (before.source and not row.evaluate):
                raise _PlanError(
                    f'{row.name} starts from {before.name}, which needs the weights of another row '
                    'itself'
                )
        without = [one.name for one in data.values() if not (row.config or one.config)]
        if without:
            raise _PlanError(f'neither row {row.name} nor data set {without[0]} has a config')
    _known('row', content['baseline'], rows)
    metric = content.get('metric', 'AP')
    _known('metric', metric, METRICS)
    margin = content.get('margin')
    if not (margin is None or (isinstance(margin, (int, float)) and margin > 0)):
        raise _PlanError(f'margin is a percentage above 0, not {margin!r}')
    first = [_entries('first', group, _FIRST_KEYS) for group in content.get('first', ())]
    for group in first:
        for name in group.get('data', ()):
            _known('data set', name, data)
        for name in group.get('rows', ()):
            _known('row', name, rows)
    seeds = list(seeds) or content.get('seeds', [0])
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
        raise _PlanError(f'seeds are a list of integers, not {seeds!r}')
    name = str(content.get('name', path.stem))
    return Plan(
        name=name,
        title=str(content.get('title', name)),
        path=path,
        baseline=content['baseline'],
        metric=metric,
        margin=margin,
        seeds=seeds,
        data=data,
        rows=rows,
        first=first,
        set=content.get('set') or {},
    )


def _data(name: str, entry: Any) -> Data:
    entry = _entries(f'data set {name}', entry, _DATA_KEYS)
    if ('root' in entry) == ('draw' in entry):
        raise _PlanError(f'data set {name} needs either root, its folder, or draw')
    draw = entry.get('draw')
    if draw is not None:
        keys = ('style', 'train', 'val', 'image_size', 'seed')
        _known('style', _entries(f'draw of {name}', draw, keys, needed=keys)['style'], STYLES)
    root = Path(entry['root']) if 'root' in entry else None
    return Data(
        name=name,
        title=str(entry.get('title', name)),
        root=root,
        draw=draw,
        config=entry.get('config'),
        set=entry.get('set') or {},
    )


def _entries(
    what: str, content: Any, known: Sequence[str], needed: Sequence[str] = ()
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _PlanError(f'{what} must have entries, not {content!r}')
    for name in content:
        _known(f'entry of {what}', name, known)
    for name in needed:
        if name not in content:
            raise _PlanError(f'{what} needs {name}')
    return content


def _named(content: dict, key: str) -> list[tuple[Any, Any]]:
    if not (isinstance(content[key], dict) and content[key]):
        raise _PlanError(f'{key} must have entries, each with a name')
    return list(content[key].items())


def _known(what: str, name: Any, names: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in names:
        close = difflib.get_close_matches(str(name), list(names), n=1)
        hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(names)}'
        raise _PlanError(f'there is no {what} called {name!r}; {hint}')


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')


def _plain(value: Any) -> Any:
    """A copy, since mmengine writes into what it is given."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
