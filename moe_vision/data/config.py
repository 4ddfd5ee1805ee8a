"""Where records come from, and what happens to those that cannot be learnt from."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe_vision.config import Config
from moe_vision.config_paths import FromFile

DRAWN_SPLITS = ("train", "val", "test")

MAX_SCENES = 1_000_000
"""Most images that a config may draw."""


class ColumnsConfig(Config):
    """Which column of a table is what. conversations, or question and answer: one of the two. images: a picture or a
    list of them, or null for text alone; where a question has no marker, its images are put before it. id and task may
    be left out.
    """

    conversations: str | None = None
    question: str | None = None
    answer: str | None = None
    images: str | None = None
    id: str | None = None
    task: str | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> "ColumnsConfig":
        pair = [self.question is not None, self.answer is not None]
        if any(pair) != all(pair) or (self.conversations is None) != any(pair):
            raise ValueError("columns name no text: give conversations, or question and answer together")
        return self

    def named(self) -> dict[str, str]:
        """Column by what it is, of those that are given."""
        return {key: column for key, column in self if column is not None}


class SourceConfig(Config):
    """One source of records: a path, a drawn set or a data set.

    path: a LLaVA-format JSON or JSONL file; image paths start at `image_root`, the file's own folder by default.

    synthetic: dense captions of, or questions about, so many `scenes` that are drawn when the run begins; `split` says
    from which range of seeds, the config's `seed` which of them.

    dataset: what Hugging Face `datasets` reads: a folder that it saved, a file or folder of Parquet, JSON, CSV or
    pictures, or a name on the Hub, of which `config` and `split` pick a part; `columns` say what is what. streaming:
    read the first `records` without fetching the rest.

    on_fault: `fatal` stops before the first step with all that is wrong; `skip` leaves faulty records out and lists
    them in the run's data_report.json. max_length: tokens of a record, those of its images among them; the language
    model's context if null. records: how many the source holds; one with another number is refused.
    """

    kinds: ClassVar[tuple[str, ...]] = ("path", "synthetic", "dataset")

    path: Annotated[str | None, FromFile()] = None
    image_root: Annotated[str | None, FromFile()] = None
    synthetic: Literal["captions", "questions"] | None = None
    scenes: int | None = Field(default=None, ge=1, le=MAX_SCENES)
    split: str = "train"
    dataset: Annotated[str | None, FromFile("name")] = None
    config: str | None = None
    columns: ColumnsConfig | None = None
    streaming: bool = False
    on_fault: Literal["fatal", "skip"] = "fatal"
    max_length: int | None = Field(default=None, ge=1)
    records: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_one_source(self) -> "SourceConfig":
        if sum(getattr(self, kind) is not None for kind in self.kinds) != 1:
            raise ValueError(f"{', '.join(self.kinds)}: give exactly one of them")
        self._check_others()
        if self.synthetic is not None:
            self._check_drawn()
        if self.dataset is not None:
            self._check_dataset()
        return self

    def _check_others(self) -> None:
        """Refuse what belongs to another source: it would be ignored."""
        if self.synthetic is None and self.scenes is not None:
            raise ValueError("scenes says how many are drawn, and nothing is: leave it out")
        if self.path is not None and self.split != "train":
            raise ValueError("split says what is drawn, or which part of a data set is read, and path is given: "
                             "leave it out")  # fmt: skip
        if self.dataset is None and (self.config is not None or self.columns is not None or self.streaming):
            raise ValueError("config, columns and streaming are a dataset's: leave them out")

    def _check_drawn(self) -> None:
        if self.image_root is not None:
            raise ValueError("image_root is where a file's pictures lie, and these are drawn: leave it out")
        if self.scenes is None:
            raise ValueError("synthetic has no number of pictures: add scenes, as 2000")
        if self.split not in DRAWN_SPLITS:
            raise ValueError(f"split '{self.split}' is never drawn: write one of {', '.join(DRAWN_SPLITS)}")
        if self.synthetic == "captions" and self.split != "train":
            raise ValueError(f"split '{self.split}' has no captions: ask for questions, or write split: train")
        if self.records is not None:
            raise ValueError("records is what a file should hold, and these are drawn: leave it out")

    def _check_dataset(self) -> None:
        if self.columns is None:
            raise ValueError("dataset has no columns: say which is what, as {images: image, conversations: turns}")
        if self.image_root is not None and self.columns.images is None:
            raise ValueError("image_root is where pictures lie, and columns name none: leave it out, or add images")
        if self.streaming and self.records is None:
            raise ValueError("streaming does not know where to end: add records, as 100000")

    @property
    def title(self) -> str:
        """What a table shows."""
        if self.synthetic is not None:
            return f"{self.synthetic} of {self.scenes} scenes, {self.split}"
        if self.dataset is not None:
            return (
                f"{self.dataset}, {self.split}"
                if self.config is None
                else f"{self.dataset} ({self.config}), {self.split}"
            )
        return str(self.path)


class PartConfig(SourceConfig):
    """A part of a mixture. weight: its share of the mixture, as against the other weights; epochs: how often it is
    seen in one epoch of the stage, 1 by default.
    """

    weight: float | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_share(self) -> "PartConfig":
        if self.weight is not None and self.epochs is not None:
            raise ValueError("weight and epochs both say how much of this is seen: give one of them")
        return self


class DataConfig(SourceConfig):
    """Data of a stage: one source, or mixture: parts that are shuffled together, with settings of their own. By epochs
    a part is seen so often in an epoch; by weights as many records are seen as all parts hold, in these shares.
    """

    kinds: ClassVar[tuple[str, ...]] = ("path", "synthetic", "dataset", "mixture")

    mixture: list[PartConfig] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _settings_stand_in_parts(cls, values: Any) -> Any:
        # A resolved config names every key, so what is forbidden beside a mixture is another value than the default.
        if isinstance(values, dict) and values.get("mixture") is not None:
            fields = {name: field.default for name, field in SourceConfig.model_fields.items() if name not in cls.kinds}
            extra = sorted(key for key in values if key in fields and values[key] != fields[key])
            if extra:
                raise ValueError(f"{', '.join(extra)} beside a mixture would say nothing: write them into its parts")
        return values

    @model_validator(mode="after")
    def _weights_agree(self) -> "DataConfig":
        weighted = [part.weight is not None for part in self.mixture or []]
        if any(weighted) and not all(weighted):
            raise ValueError("some parts of the mixture have a weight and some do not: give all of them one, or epochs")
        return self

    @property
    def title(self) -> str:
        return super().title if self.mixture is None else " + ".join(part.title for part in self.mixture)

    @property
    def parts(self) -> list[PartConfig]:
        """Parts of a mixture; one source is the only part of its own."""
        if self.mixture is not None:
            return self.mixture
        return [PartConfig.model_validate(self.model_dump(exclude={"mixture"}))]
