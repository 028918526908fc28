"""A config from its file and from `key=value` settings of the command line.

Every mistake is a ValueError of one sentence with the nearest name. Called by `__main__.py`.
"""

import ast
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from data_curation.config import (
    ITEMS,
    base,
    component,
    flatten,
    get,
    level,
    sample,
    seed_set,
)
from dinojax.data.options import nearest

CONFIGS = pathlib.Path(__file__).parent / "configs"


def load(path: str) -> ConfigDict:
    """The config of FILE, or of FILE:VARIANT; a bare name is one of `configs/`.

    Raises:
      ValueError: there is no such file, or it fails; one sentence.
    """
    name, _, variant = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file() and (CONFIGS / f"{name}.py").is_file():
        file = CONFIGS / f"{name}.py"
    if not file.is_file():
        known = sorted(found.stem for found in CONFIGS.glob("[a-z]*.py"))
        raise ValueError(f"there is no config file {name!r}; {nearest(file.stem, known)}")
    scope: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(file.read_text(), str(file), "exec"), scope)
        config = scope["get_config"](variant) if variant else scope["get_config"]()
    except Exception as error:  # whatever the file itself does
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the config file {name!r} fails ({reason})") from None
    return complete(config, name)


def complete(config: Any, name: str) -> ConfigDict:
    """The config, if it has exactly the keys of `base()`; ValueError otherwise."""
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of {name!r} gives no ConfigDict; start from config.base()")
    _compare(config, base(), name, "")
    for key, pattern in ITEMS.items():
        for index, item in enumerate(get(config, key)):
            if not isinstance(item, ConfigDict):
                raise ValueError(f"{name}: {key}[{index}] is {item!r}; expected {_call(key)}")
            _compare(item, pattern, name, f"{key}[{index}].")
    return config


def _compare(config: ConfigDict, pattern: ConfigDict, name: str, where: str) -> None:
    for key in config:
        if key not in pattern:
            raise ValueError(f"{name} has an unknown key {where}{key}; {nearest(key, pattern)}")
    for key in pattern:
        if key not in config:
            raise ValueError(f"{name} lacks the key {where}{key}; start from config.base()")
        if isinstance(pattern[key], ConfigDict):
            if not isinstance(config[key], ConfigDict):
                raise ValueError(f"{name}: {where}{key} is {config[key]!r}; expected its keys")
            _compare(config[key], pattern[key], name, f"{where}{key}.")


def _call(key: str) -> str:
    names = {"cluster.levels": "level(k, ...)", "sample": "sample(name, target, ...)"}
    names |= {"retrieve": "seed_set(name, embeddings, ...)", "mix.components": "component(name)"}
    return names[key]


def change(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """A copy with `key=value` settings made: "cluster.levels[0].k=500", "dedup.method=none".

    Values are Python's: numbers, True, ("a", "b"); anything else is text. Tuples of items are
    written with their functions: 'cluster.levels=(level(1000, 15, 10), level(300, 2, 10))'.

    Raises:
      ValueError: an unknown key (with the nearest one), or a value of another kind.
    """
    config = copy(config)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is no setting; expected key=value, such as seed=1")
        _set(config, key.removeprefix("--"), text)
    return config


def copy(config: ConfigDict) -> ConfigDict:
    """As it says; a ConfigDict does not copy the items of its tuples."""
    config = config.copy_and_resolve_references()
    for key in ITEMS:
        above, _, last = key.rpartition(".")
        parent = get(config, above) if above else config
        parent[last] = tuple(item.copy_and_resolve_references() for item in parent[last])
    return config


def _set(config: ConfigDict, key: str, text: str) -> None:
    known = flatten(config)
    parent: Any = config
    *words, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    try:
        for word in words:
            parent = parent[int(word)] if word.isdecimal() else parent[word]
        before = parent[last]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"there is no key {key!r}; {nearest(key, known)}") from None
    if isinstance(before, ConfigDict):
        inside = next(name for name in known if name.startswith(f"{key}."))
        raise ValueError(f"{key} is a section; set a key in it, such as {inside}={known[inside]}")
    value = _items(key, text) if key in ITEMS else _parse(key, text, before)
    with config.ignore_type():
        parent[last] = value


def _items(key: str, text: str) -> tuple[ConfigDict, ...]:
    """level(1000, 15, 10), level(...) -> their ConfigDicts. Nothing but the function is called."""
    function = {"cluster.levels": level, "sample": sample, "retrieve": seed_set}.get(key, component)
    wrong = ValueError(f"{key}={text} cannot be read; expected ({_call(key)}, ...)")
    try:
        tree = ast.parse(f"({text},)" if not text.startswith("(") else text, mode="eval").body
    except SyntaxError:
        raise wrong from None
    items = []
    for node in tree.elts if isinstance(tree, ast.Tuple) else [tree]:
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != function.__name__:
            raise wrong
        try:
            named = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            items.append(function(*map(ast.literal_eval, node.args), **named))
        except (ValueError, TypeError):
            raise wrong from None
    return tuple(items)


def _parse(key: str, text: str, before: Any) -> Any:
    """The value that `text` means where a value like `before` stood."""
    if isinstance(before, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(before, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if isinstance(before, float) and type(value) is int:
        value = float(value)
    if isinstance(before, int) and isinstance(value, float) and value == int(value):
        value = int(value)  # 17e9
    if type(value) is not type(before):
        kinds = {bool: "True or False", int: "a whole number", float: "a number"}
        raise ValueError(f"{key} is {text!r}; expected {kinds.get(type(before), 'a tuple')}")
    return value
