"""What can be wrong with a record, how it is told, and the report on what a run had to leave out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from moe_vision.slicing import PlanError

Reason = Literal["format", "markers", "image_missing", "image_broken", "image_size", "too_long", "text"]
"""Why a record cannot be learnt from. format: not LLaVA's structure; markers: they do not match the images;
image_missing: no such file; image_broken: not decodable; image_size: a size that the slicing refuses; too_long: more
tokens than fit; text: the chat template or the tokenizer does not take it."""

SHOWN_PROBLEMS = 10


class RecordFault(ValueError):
    """One thing that is wrong with a record or with one of its pictures."""

    # The reason can be left out because a loader's process hands an error on as its class and one text; only pictures
    # are read there.
    def __init__(self, problem: str, reason: Reason = "image_broken") -> None:
        super().__init__(problem)
        self.reason: Reason = reason


@contextmanager
def faults_of(record: str) -> Iterator[None]:
    """Turn everything that is raised in the block into a RecordFault that names the record: chat templates, tokenizers
    and decoders raise all kinds of errors on what they do not take."""
    try:
        yield
    except RecordFault:
        raise
    except PlanError as error:
        raise RecordFault(str(error), "image_size") from error
    except Exception as error:
        raise RecordFault(
            f"record {record!r}: the chat template or tokenizer does not take it ({type(error).__name__}: {error}); "
            "change its turns, or write on_fault: skip",
            "text",
        ) from error


@dataclass(frozen=True)
class Fault:
    """A record that cannot be learnt from. id: the record's, or its number or line where it has none."""

    id: str
    reason: Reason
    problem: str


class DataError(ValueError):
    """Everything that is wrong with one source of data."""

    def __init__(self, source: object, problems: Sequence[str]) -> None:
        more = len(problems) - SHOWN_PROBLEMS
        lines = [f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
        lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]] + (
            [f"  … and {more} more"] if more > 0 else []
        )
        super().__init__("\n".join(lines))


def problems_of(faults: Sequence[Fault]) -> list[str]:
    """Messages of faults; one of an image that several records share is given once, with the first record's id."""
    records: dict[str, list[str]] = {}
    for fault in faults:
        records.setdefault(fault.problem, []).append(fault.id)
    return [
        problem if not problem.startswith("image ") else f"{problem} [record {ids[0]!r}{more(len(ids) - 1)}]"
        for problem, ids in records.items()
    ]


def more(count: int) -> str:
    return f" and {count} more" if count else ""


@dataclass(frozen=True)
class SourceReport:
    """What became of one source. read: its records; used: those without a fault; samples: those that a run sees in an
    epoch, after a mixture's weights or epochs."""

    source: str
    read: int
    used: int
    samples: int
    skipped: tuple[Fault, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Skipped records by reason, the most frequent first."""
        return dict(Counter(fault.reason for fault in self.skipped).most_common())

    def to_dict(self) -> dict[str, Any]:
        records = [{"id": fault.id, "reason": fault.reason, "problem": fault.problem} for fault in self.skipped]
        return {
            "source": self.source, "read": self.read, "used": self.used, "samples": self.samples,
            "skipped": self.counts, "records": records,
        }  # fmt: skip

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return f"{self.source}: {len(self.skipped)} of {self.read} records are skipped ({counts})"
