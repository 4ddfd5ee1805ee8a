"""Three hundred odd inputs in the gate; `python -m tests.fuzz --cases 5000` tries more."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import judge
from tests.fuzz.__main__ import numbered, run_case
from tests.fuzz.cases import AREAS
from tests.fuzz.judge import WrongError, judged

CASES = 250


@pytest.mark.parametrize("area", list(AREAS))
def test_odd_inputs_are_refused_by_name_or_read_right(area: str) -> None:
    bad = []
    for other, number in numbered(CASES):
        if other == area:
            what, verdict = run_case(area, number, 0)
            if not verdict.good:
                bad.append(f"python -m tests.fuzz --area {area} --case {number}: {verdict} ({what[:200]!r})")
    assert not bad, "\n".join(bad)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["yaml", "records", "images"]), st.integers(CASES, 10**9))
def test_any_other_case_too(area: str, number: int) -> None:
    what, verdict = run_case(area, number, 0)
    assert verdict.good, f"{verdict} ({what[:500]!r})"


def test_a_case_is_made_by_its_seed() -> None:
    (first, verdict), (second, again) = run_case("yaml", 3, 5), run_case("yaml", 3, 5)
    assert first == second and verdict.kind == again.kind
    assert first != run_case("yaml", 3, 6)[0]


def raises(error: Exception) -> None:
    raise error


def test_each_kind_of_end_is_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "SECONDS", 1)
    ends = {
        "right": lambda: None, "refused": lambda: raises(ValueError("config.yaml is bad")),
        "unnamed": lambda: raises(ValueError("bad")), "traceback": lambda: raises(TypeError("config.yaml")),
        "wrong": lambda: raises(WrongError("other")), "hang": lambda: time.sleep(5),
    }  # fmt: skip
    assert {kind: judged(work, ("config.yaml",)).kind for kind, work in ends.items()} == {kind: kind for kind in ends}
