"""YAML as configs use it: plain values of bounded size, in which no key is given twice."""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from moe_vision.errors import ConfigError, Problem

MAX_DEPTH = 64
"""Most levels of lists and mappings in each other."""

MAX_VALUES = 100_000
"""Most values of a text, those that aliases repeat counted each time."""

PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class Fault(yaml.MarkedYAMLError):
    """A valid YAML text that a config cannot be made of. key, value: what a message shows."""

    def __init__(self, cause: str, hint: str, mark: Any, key: str = "", value: Any = None) -> None:
        super().__init__(None, None, cause, mark)
        self.hint, self.key, self.value = hint, key, value


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with numbers such as 1e-5, without dates, and with limits."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # values in a node, by the node's id

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        mark = self.peek_event().start_mark
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Fault(f"is nested more than {MAX_DEPTH} levels deep", "write flatter YAML", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if node.end_mark is None:  # an alias of a list or mapping that has not ended
            raise Fault("has an alias that contains itself", "write the value out", mark)
        if id(node) not in self.sizes:
            self.measure(node)
        if self.sizes[id(node)] > MAX_VALUES:
            raise Fault(f"holds more than {MAX_VALUES:,} values, aliases counted", "use fewer aliases", mark)
        return node

    def measure(self, node: Node) -> None:
        """Check a finished node, and count its values."""
        children: list[Node] = []
        if isinstance(node, MappingNode):
            children = [part for pair in node.value for part in pair]
            self.check_keys(node)
        elif isinstance(node, SequenceNode):
            children = node.value
        self.sizes[id(node)] = 1 + sum(self.sizes.get(id(child), 1) for child in children)

    def check_keys(self, node: MappingNode) -> None:
        """Raise Fault where a mapping has a key twice."""
        seen: dict[Hashable, Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise Fault("has a key that is a list or a mapping", "write a name before the colon", key.start_mark)
            value = key.value if key.tag.endswith(":merge") else self.construct_object(key)
            if value in seen:
                first, second = seen[value].start_mark.line + 1, key.start_mark.line + 1
                raise Fault(
                    f"is given twice, in line {first} and in line {second}", "remove one of them", key.start_mark,
                    str(value), key.value,
                )  # fmt: skip
            seen[value] = key

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        if node.tag not in PLAIN_TAGS:
            raise Fault(f"has the tag {node.tag}, which configs do not use", "remove the tag", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            name = node.tag.rpartition(":")[2]
            shown = str(node.value)[:60]
            raise Fault(f"has {shown!r}, which is no {name} ({error})", "fix the value", node.start_mark) from None
        if isinstance(value, str) and (bad := re.search("[\0\ud800-\udfff]", value)):
            found = f"the character \\u{ord(bad[0]):04x}"
            raise Fault(f"has {found} in a text, which no file name or prompt holds", "remove it", node.start_mark)
        return value


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str, key: str, value: Any) -> Any:
    """Plain values of a YAML text. source: its file; key, value: what a message names where the whole text is at fault.

    Raises ConfigError for what is not YAML, for a key that is given twice, for text that is nested too deeply or that
    aliases make too large.
    """
    try:
        return yaml.load(text, Loader)
    except Fault as fault:
        where = "" if fault.problem_mark is None else f" (line {fault.problem_mark.line + 1})"
        problem = Problem(fault.key or key, fault.value if fault.key else value, f"{fault.problem}{where}", fault.hint)
    except yaml.YAMLError as error:
        problem = Problem(key, value, f"is not YAML: {described(error)}", "fix its syntax")
    except (ValueError, OverflowError) as error:  # an escape such as "\U00110000"
        problem = Problem(key, value, f"is not YAML: {error}", "fix its syntax")
    raise ConfigError(source, [problem])


def described(error: yaml.YAMLError) -> str:
    """A YAML error in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    what = ", ".join(str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    return f"{what} in line {mark.line + 1}, column {mark.column + 1}"
