"""From a source to the samples of a run: read, check, tokenise, mix. All of it before a step decodes a picture."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from moe_vision.data.chat import Tokenised, chat_template, tokenise
from moe_vision.data.config import PartConfig
from moe_vision.data.faults import DataError, Fault, RecordFault, SourceReport, faults_of, problems_of
from moe_vision.data.records import Record, read_records
from moe_vision.modeling import MoeVisionProcessor


@dataclass(frozen=True)
class Source:
    """One source as read. title: what the user calls it; count: its records, those with faults among them; records:
    those without."""

    title: str
    config: PartConfig
    count: int
    records: tuple[Record, ...]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A record and its tokens."""

    record: Record
    text: Tokenised


@dataclass(frozen=True)
class Samples:
    """What a run sees in an epoch, in the order of its sources, and what became of each of these."""

    items: tuple[Sample, ...]
    reports: tuple[SourceReport, ...]

    @property
    def records(self) -> list[Record]:
        return [item.record for item in self.items]

    @property
    def texts(self) -> list[Tokenised]:
        return [item.text for item in self.items]

    def moved(self, old: Path, new: Path) -> "Samples":
        """The same with pictures that lay below `old` below `new`."""
        return replace(self, items=tuple(replace(i, record=moved(i.record, old, new)) for i in self.items))

    def tokenised_by(self, processor: MoeVisionProcessor) -> "Samples":
        """The same for another model, whose images may have other numbers of tokens."""
        return replace(self, items=tuple(Sample(i.record, tokenise(i.record, processor)) for i in self.items))


def moved(record: Record, old: Path, new: Path) -> Record:
    images = (new / path.relative_to(old) if path.is_relative_to(old) else path for path in record.images)
    return replace(record, images=tuple(images))


def read_source(part: PartConfig, title: str, workers: int = 1) -> Source:
    """Read a part that has a path. Where faulty records are skipped, every picture is decoded once, in so many threads,
    so that what is learnt from is settled here.

    Raises DataError: faults that are fatal, another number of records than the config says, or none without a fault.
    """
    assert part.path is not None
    path = Path(part.path)
    root = Path(part.image_root) if part.image_root is not None else path.parent
    records, faults = read_records(path, root, verify=part.on_fault == "skip", workers=workers)
    count = len(records) + len(faults)
    if part.records is not None and part.records != count:
        raise DataError(
            title, [f"holds {count} records, and the config says {part.records}: mend `records`, or the data"]
        )
    return checked(Source(title, part, count, tuple(records), tuple(faults)))


def checked(source: Source) -> Source:
    """The source, if its faults are none, or may be skipped and leave a record. Raises DataError."""
    if source.faults and source.config.on_fault == "fatal":
        raise DataError(source.title, problems_of(source.faults))
    if not source.records:
        skipped = f"all {source.count} records are skipped, which leaves nothing to learn from:"
        raise DataError(source.title, [skipped, *problems_of(source.faults)])
    return source


def fit(source: Source, processor: MoeVisionProcessor, context: int | None) -> tuple[Source, list[Sample]]:
    """Tokenise a source's records with the planned tokens of their images. More tokens than `max_length`, or than the
    context of the language model, are a fault, and so is a picture whose size the slicing refuses.

    Raises DataError as `checked` does, and ValueError where max_length is beyond the context or there is no template.
    """
    limit = source.config.max_length
    if limit is not None and context is not None and limit > context:
        raise ValueError(
            f"{source.title}: max_length {limit} is beyond the language model's context of {context}: lower it, or "
            "leave it out"
        )
    limit = context if limit is None else limit
    chat_template(processor)  # its absence is no fault of the records
    samples, faults = [], []
    for record in source.records:
        try:
            with faults_of(record.id):
                text = tokenise(record, processor)
            check_length(record, len(text.input_ids), limit)
        except RecordFault as error:
            faults.append(Fault(record.id, error.reason, str(error)))
        else:
            samples.append(Sample(record, text))
    left = tuple(sample.record for sample in samples)
    return checked(replace(source, records=left, faults=(*source.faults, *faults))), samples


def check_length(record: Record, length: int, limit: int | None) -> None:
    """Raise RecordFault if a record has more tokens than fit."""
    if limit is not None and length > limit:
        raise RecordFault(
            f"record {record.id!r}: has {length} tokens, those of its images among them, and {limit} fit; shorten it, "
            "raise max_length if that is what limits it, or write on_fault: skip",
            "too_long",
        )


ItemT = TypeVar("ItemT")


def mix(sources: Sequence[Source], items: Sequence[Sequence[ItemT]], seed: int) -> list[list[ItemT]]:
    """What is seen of each source's items in an epoch: each as often as another, or once more, by weights or epochs.

    By weights, as many in all as there are items. Which ones are seen once more is drawn from the seed. Raises
    DataError where nothing of a source would be seen.
    """
    sizes = [len(own) for own in items]
    weights = [source.config.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if given:  # DataConfig sees to it that then all have one
        counts = shares(sum(sizes), given)
    else:
        counts = [round(size * (source.config.epochs or 1)) for size, source in zip(sizes, sources, strict=True)]
    mixed = []
    for number, (source, own, count) in enumerate(zip(sources, items, counts, strict=True)):
        if count == 0:
            raise DataError(source.title, [f"none of its {len(own)} records would be seen: raise its weight or epochs"])
        whole, rest = divmod(count, len(own))
        more = sorted(random.Random(f"{seed}:{number}").sample(range(len(own)), rest))
        mixed.append([*own] * whole + [own[index] for index in more])
    return mixed


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, which add up to the total: the largest remainders round up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def samples_of(sources: Sequence[Source], processor: MoeVisionProcessor, context: int | None, seed: int) -> Samples:
    """Fit every source and mix them. Raises as `fit` and `mix` do."""
    fitted = [fit(source, processor, context) for source in sources]
    mixed = mix([source for source, _ in fitted], [samples for _, samples in fitted], seed)
    reports = tuple(
        SourceReport(source.title, source.count, len(source.records), len(seen), source.faults)
        for (source, _), seen in zip(fitted, mixed, strict=True)
    )
    return Samples(tuple(sample for seen in mixed for sample in seen), reports)
