"""The data of a recipe: which files are learned from, how they are mixed, and what is validated on."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from adapters.tasks import Stage, Task


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSection(Section):
    """One of several data files, each with settings of its own."""

    file: str
    task: Task | None = Field(default=None, description="left out, told from the rows")
    limit: int | None = Field(default=None, ge=1, description="only the first so many rows")
    repeat: int = Field(default=1, ge=1, description="passes over it in an epoch")
    share: float | None = Field(
        default=None, gt=0, description="of an epoch's rows, beside the others' shares; the scarcest comes whole"
    )
    columns: dict[str, str] | None = Field(default=None, description="names of its columns; left out, data.columns")
    stages: tuple[Stage, ...] | None = Field(
        default=None, min_length=1, description="what its rows with reasons teach; left out, reason.stages"
    )


Sources = str | tuple[SourceSection, ...]


class DataSection(Section):
    """What is learned from: a file, or a list of files with a task each."""

    train: Sources = Field(
        default="easy-vqa:train",
        description="a file, a packaged set, or files, each with task, limit, repeat or share, and columns",
    )
    val: Sources | None = Field(default=None, description="data to choose on; left out, images are held out of train")
    terms: str | None = Field(default=None, description="terms of the data; what is trained on it inherits them")
    val_fraction: float | None = Field(
        default=None, gt=0, lt=1,
        description="of the pictures, held out if val is left out; left out too, what gives 100 rows: 5 to 25 %",
    )  # fmt: skip
    fold: str | None = Field(
        default=None, pattern=r"^[1-9]\d*/[1-9]\d*$",
        description="hold out one of several parts of the pictures, such as 2/5: the second of five",
    )  # fmt: skip
    hold_out: bool = Field(default=True, description="false: learn from all rows; nothing is validated or chosen")
    val_limit: int | None = Field(
        default=None, ge=1, description="at most so many validation rows, of each file if val names several"
    )
    limit: int | None = Field(default=None, ge=1, description="only the first so many training rows, of each file")
    columns: dict[str, str] | None = Field(
        default=None, description="the data's name of a field by ours, such as {image: photo, question: prompt}"
    )
    skip_bad_rows: bool = Field(default=False, description="leave bad rows out, count and tell them")
    allow_outside: bool = Field(
        default=False, description="read pictures that data files name outside their own folders (--allow-outside)"
    )
    match: Literal["exact", "set"] = Field(
        default="exact", description="how validation compares answers; set: lists with commas, in any order"
    )
    cache: bool = Field(
        default=True, description="keep features on disk, if they fit; off: pictures are encoded as they are needed"
    )
    views: int = Field(
        default=1, ge=1, le=64, description="of each training picture: itself, a part, a mirrored part, a part, …"
    )

    @field_validator("train", "val")
    @classmethod
    def _shares_of_all(cls, sources: Sources | None, info: ValidationInfo) -> Sources | None:
        listed = () if sources is None or isinstance(sources, str) else sources
        shares = [source.share for source in listed if source.share is not None]
        if shares and info.field_name == "val":
            raise ValueError("a share is of what is trained on; validation takes each row once")
        if shares and len(shares) < len(listed):
            raise ValueError("give each file a share, or none")
        if shares and any(source.repeat > 1 for source in listed):
            raise ValueError("a share and a repeat contradict each other; give one of them")
        return sources
