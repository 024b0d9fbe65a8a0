"""Strict JSON: what goes out comes back, and what cannot be meant is named."""

import copy
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.config import digest, from_dict, load, to_dict, to_json
from engram_lm.errors import ConfigError
from engram_lm.model.presets import PRESETS
from engram_lm.train.loop import TrainConfig


@dataclass(frozen=True)
class Leaf:
    width: int = 1
    scale: float = 1.0
    kind: Literal["plain", "squared"] = "plain"


@dataclass(frozen=True)
class Tree:
    name: str
    leaf: Leaf = field(default_factory=Leaf)
    maybe: Leaf | None = None
    sizes: int | tuple[int, ...] = 3
    flag: bool = False
    pair: tuple[float, ...] = (0.5, 1.0)

    def __post_init__(self) -> None:
        if self.name == "":
            raise ConfigError("a tree has a name.")


leaves = st.builds(Leaf, st.integers(), st.floats(allow_nan=False), st.sampled_from(["plain", "squared"]))
trees = st.builds(
    Tree,
    st.text(min_size=1),
    leaves,
    st.none() | leaves,
    st.integers() | st.lists(st.integers()).map(tuple),
    st.booleans(),
    st.lists(st.floats(allow_nan=False)).map(tuple),
)


@given(trees)
def test_what_goes_out_comes_back(tree):
    assert from_dict(Tree, json.loads(to_json(tree))) == tree
    assert digest(tree) == digest(from_dict(Tree, to_dict(tree)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_comes_back(preset, tmp_path):
    config = TrainConfig(model=PRESETS[preset])
    (tmp_path / "config.json").write_text(to_json(config), encoding="utf-8")
    assert load(TrainConfig, tmp_path / "config.json") == config


def test_the_digest_sees_every_leaf():
    trees = [
        Tree("a"),
        Tree("b"),
        Tree("a", Leaf(2)),
        Tree("a", maybe=Leaf()),
        Tree("a", sizes=(3,)),
        Tree("a", flag=True),
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "lief": {}}, "config: unknown key 'lief'.*ignored silently.*mean 'leaf'"),
        ({"name": "a", "leaf": {"widht": 2}}, r"config\.leaf: unknown key 'widht'.*mean 'width'"),
        (
            {"name": "a", "leaf": {"zzz": 2}},
            r"config\.leaf: unknown key 'zzz'.*Known keys: width, scale, kind",
        ),
        ({"name": "a", "maybe": {"widht": 2}}, r"config\.maybe: unknown key 'widht'"),
        ({"name": 3}, r"config\.name: expected str, got 3"),
        ({"name": None}, r"config\.name: expected str, got None"),
        ({"name": "a", "leaf": None}, r"config\.leaf: expected an object with the fields of Leaf, got None"),
        ({"name": "a", "leaf": {"width": 1.0}}, r"config\.leaf\.width: expected int, got 1\.0"),
        ({"name": "a", "leaf": {"width": True}}, r"config\.leaf\.width: expected int, got True"),
        ({"name": "a", "leaf": {"scale": True}}, r"config\.leaf\.scale: expected float, got True"),
        ({"name": "a", "leaf": {"scale": "1"}}, r"config\.leaf\.scale: expected float, got '1'"),
        (
            {"name": "a", "leaf": {"kind": "round"}},
            r"config\.leaf\.kind: 'round' is not one of 'plain', 'squared'",
        ),
        ({"name": "a", "flag": 1}, r"config\.flag: expected bool, got 1"),
        ({"name": "a", "sizes": "3"}, r"config\.sizes: expected .*got '3'"),
        ({"name": "a", "sizes": [3, "4"]}, r"config\.sizes\[1\]: expected int, got '4'"),
        ({"name": "a", "pair": 1.0}, r"config\.pair: expected a list, got 1\.0"),
        ({}, "config: .*missing.*'name'"),
        ({"name": ""}, r"config: a tree has a name\."),
        ([], "config: expected an object with the fields of Tree"),
    ],
)
def test_what_cannot_be_meant_is_named(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Tree, data)


def test_none_where_it_is_allowed_and_integers_for_floats():
    tree = from_dict(Tree, {"name": "a", "maybe": None, "pair": [1, 2], "sizes": [1]})
    assert tree == Tree("a", maybe=None, pair=(1.0, 2.0), sizes=(1,))
    assert type(tree.pair[0]) is float


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def paths(data, path=()):
    """Every place in nested objects."""
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from paths(value, (*path, key))


@given(st.data())
def test_any_value_anywhere_is_a_configuration_or_an_error_that_says_where(data):
    given = copy.deepcopy(to_dict(TrainConfig(model=PRESETS["engram-27b"])))
    *parents, last = data.draw(st.sampled_from([path for path in paths(given) if path]))
    inner = given
    for key in parents:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    try:
        config = from_dict(TrainConfig, given)
        assert from_dict(TrainConfig, json.loads(to_json(config))) == config
        return
    except ConfigError as error:
        message = str(error)
    assert message.startswith("config")
    assert all(part in message for part in parents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"{}", "missing"),
        (b"[1]", "expected an object"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"run.json: .*{message}"):
        load(Tree, path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read \(No such file"):
        load(Tree, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(Tree, tmp_path)
