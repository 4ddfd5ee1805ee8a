"""YAML that a config cannot be made of: an error that names the line, never a hang or a traceback."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe_vision.config import ConfigError, apply_override
from moe_vision.yaml_reader import MAX_DEPTH, parse_yaml

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30)
)


def parsed(text: str) -> object:
    return parse_yaml(text, "file.yaml", "file", "file.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", r"a = 'a': is given twice, in line 1 and in line 3"),
        ("x: {a: 1, b: {c: 1, 'c': 2}}", r"c = 'c': is given twice"),
        ("1: a\n0x1: b", r"is given twice, in line 1 and in line 2"),
        ("a: {<<: {b: 1}, <<: {b: 2}}", r"<< = '<<': is given twice"),
        (LAUGHS, "more than 100,000 values, aliases counted"),
        (MERGED_LAUGHS, "more than 100,000 values, aliases counted"),
        ("a: &a [*a]", "an alias that contains itself"),
        ("a: &a {b: *a}", "an alias that contains itself"),
        ("[" * 100_000, "nested more than"),
        ("{a: " * 100_000, "nested more than"),
        ("- " * 100_000, "nested more than"),
        ("a: !!python/object/apply:os.system [echo]", "has the tag"),
        ("a: !!set {b}", "has the tag"),
        ("a: !!bool maybe", "which is no bool"),
        ("a: !!int ''", "which is no int"),
        ("a: " + "9" * 5000, "which is no int"),
        ('a: "\\ud800"', "the character \\\\ud800"),
        ('a: "\\0"', "the character \\\\u0000"),
        ('a: "\\UFFFFFFFF"', "is not YAML"),
        ("a: *b", "is not YAML"),
        ("a: [1", "is not YAML"),
        ("? [a]\n: 1", "a key that is a list"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: \x07", "is not YAML"),
    ],
)
def test_text_is_refused_with_its_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parsed(text)
    assert str(caught.value).startswith("file.yaml: 1 problem") and len(str(caught.value)) < 1000


def test_merges_and_aliases_of_usual_size_work() -> None:
    text = "base: &b {x: 1, y: [1, 2]}\none: {<<: *b, x: 2}\ntwo: *b\n"
    assert parsed(text) == {
        "base": {"x": 1, "y": [1, 2]}, "one": {"x": 2, "y": [1, 2]}, "two": {"x": 1, "y": [1, 2]},
    }  # fmt: skip


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, width=32) | st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_what_pyyaml_writes_is_read_as_pyyaml_reads_it(value: object) -> None:
    text = yaml.safe_dump(value)
    assert parsed(text) == yaml.safe_load(text)


def test_depth_that_is_allowed_reads() -> None:
    depth = MAX_DEPTH - 1
    assert parsed("[" * depth + "]" * depth) == yaml.safe_load("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "override", ["a=[", "a={b: 1, b: 2}", "a=" + "[" * 9999, "=1", "a", "a..b=1", ".".join("a" * 99) + "=1"]
)
def test_overrides_that_are_not_yaml_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="command line: 1 problem"):
        apply_override({}, override)
