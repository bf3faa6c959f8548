"""YAML as recipes are written in it: plain data, read strictly, as it may be a stranger's."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

#: Texts that are numbers by the YAML that the Hub reads (1.2), and none by Python's (1.1).
_NUMBER = re.compile(r"[-+]?[\d_]*\.?[\d_]*([eE][-+]?\d+)?|[-+]?0o[0-7]+")
#: Values in one text: a learned soup has one for each tensor and ingredient; more takes a stranger's reader minutes.
_MOST_VALUES = 500_000
#: Of a number; longer ones are nobody's, and not even shown by Python.
_MOST_DIGITS = 400


class _Strict(yaml.composer.Composer, yaml.constructor.SafeConstructor):
    """YAML without aliases and values without end, and without duplicate keys, which hide each other."""

    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.values += 1
        if self.values > _MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"it has more than {_MOST_VALUES:,} values", None)
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            mark = self.get_event().start_mark  # type: ignore[attr-defined]
            raise yaml.composer.ComposerError(None, None, "a recipe has no aliases", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for written, _ in node.value:
            key = self.construct_object(written, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    message = f"the key '{key}' stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, message, written.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Loader(_Strict, yaml.CSafeLoader):
    """With libyaml's parser, which takes a tenth of the time of PyYAML's own."""

    def __init__(self, stream: str) -> None:
        yaml.CSafeLoader.__init__(self, stream)
        yaml.composer.Composer.__init__(self)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float | str:
    """What looks like a number: not in base 60, as `1:30` is by YAML 1.1, and of no more digits than any has."""
    text = str(loader.construct_scalar(node))
    if ":" in text:
        return text
    if len(text) > _MOST_DIGITS:
        message = f"a number has {len(text):,} digits"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    whole = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)
# 1e-6, which by YAML 1.1 is a text for want of a point and, in 1.0e6, of a sign.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Plain data from a stranger's YAML: no tags that make objects, no aliases, no key twice.

    Raises:
        yaml.YAMLError: It is not such YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        # What PyYAML raises for a value that its tag, or its looks, do not fit: `!!int foo`, `2001-99-99`.
        raise yaml.YAMLError(f"a value is not what it looks like: {error}") from None


def line_of(text: str, place: Sequence[int | str]) -> int:
    """The line of a value in YAML, from 1 on; of what it is in, where it is not there itself; 0 where that is all.

    >>> text = "a: 1\\nb:\\n- c: 2\\n"
    >>> line_of(text, ["b", 0, "c"]), line_of(text, ["b", 0, "data", "d"]), line_of(text, ["e"])
    (3, 3, 0)
    """
    node, line = yaml.compose(text, Loader=_Loader), 0
    for part in place:
        pairs: Any = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.SequenceNode):
            pairs = enumerate(pairs)
        inner = {getattr(at, "value", at): (at, each) for at, each in pairs}
        if part in inner:
            written, node = inner[part]
            line = (node if isinstance(written, int) else written).start_mark.line + 1
    return line


class _Dumper(yaml.SafeDumper):
    """YAML with lists of numbers on one line: `tensor_weights` has one for each tensor."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # In other styles some characters are line breaks, which are read as spaces.
        style = '"' if not data.isprintable() else "'" if _NUMBER.fullmatch(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        numbers = all(isinstance(each, int | float) for each in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=numbers and bool(data))


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)


def write_yaml(values: Any) -> str:
    """Plain data as YAML, in its own order.

    >>> print(write_yaml({"b": [1.0, 2.0], "a": ["x"]}), end="")
    b: [1.0, 2.0]
    a:
    - x
    """
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    # All that cannot be seen is in double quotes; as it is, some of it turns the order of what follows.
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else f"\\U{ord(found[0]):08X}", text)
