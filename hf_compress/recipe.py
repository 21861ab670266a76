"""A recipe: everything about a compression in one YAML file, and the training stages that it asks for.

    task: text-classification
    teacher: me/my-big-model            # hub id or folder
    data: {train: train.csv, test: test.csv}
    student: {layers: 3}

Paths are relative to the recipe. `ship.py` runs it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import files
from .errors import ConfigurationError, ForeignFileError, HfCompressError, UnknownNameError
from .facts import Text

logger = logging.getLogger(__name__)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
"""A path; without the zero byte, which no system takes."""
Count = Annotated[int, Field(ge=1, le=2**20)]
MAX_EPOCHS = 1e6


class Data(_Part):
    """Files of rows; csv, jsonl (also .gz), parquet."""

    train: Place = Field(description="labelled rows")
    unlabelled: Place | None = Field(default=None, description="further rows without labels, for the distilled student")
    choice: Place | None = Field(default=None, description="rows for choosing learning rates and precision")
    test: Place | None = Field(default=None, description="rows for the reported numbers, and nothing else")
    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] | None = Field(default=None, description="names of the classes, in the order of their ids")
    max_length: Count = Field(default=128, description="tokens kept of a text")
    name: Text | None = Field(default=None, description="of the data, for the record; None: that of the train file")
    licence: Text | None = None


class Fitting(_Part):
    """How a model is trained; the values for encoders that are usual in the field."""

    learning_rate: float = Field(default=5e-5, gt=0)
    epochs: float = Field(default=3.0, gt=0, le=MAX_EPOCHS)
    batch_size: Count = 32
    warmup: float = Field(default=0.1, ge=0, le=1, description="part of the steps")
    weight_decay: float = Field(default=0.01, ge=0)


class Student(_Part):
    """What is kept of the teacher; sizes that are left out are the teacher's."""

    layers: (
        Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None
    ) = Field(default=None, description="how many, or which ones")
    keep: Literal["even", "first", "last"] = "even"
    hidden: Count | None = Field(default=None, description="hidden dimensions; in most encoders heads are given too")
    heads: Count | None = Field(default=None, description="attention heads of a layer")
    intermediate: Count | None = Field(default=None, description="neurons of an MLP")

    @model_validator(mode="after")
    def _smaller(self) -> Student:
        if (self.layers, self.hidden, self.heads, self.intermediate) == (None,) * 4:
            raise ValueError("Give layers, hidden, heads or intermediate: a student is smaller than its teacher")
        return self


class Baseline(_Part):
    """The same student from the same start, trained on the labels without a teacher: the better of some rates."""

    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(2e-5, 5e-5, 1e-4), min_length=1)
    epochs: float = Field(default=3.0, gt=0, le=MAX_EPOCHS)


class Export(_Part):
    """Which graphs are written."""

    quantize: Literal["int8"] | None = "int8"
    max_drop: float = Field(default=0.01, ge=0, le=1, description="of accuracy, that int8 may cost")
    min_agreement: float = Field(default=0.95, ge=0, le=1, description="of int8's decisions with float32's")
    teacher: bool = Field(default=False, description="export the teacher too, into its own folder, to compare with")


class Measure(_Part):
    """How latency is taken."""

    threads: int = Field(default=1, ge=1, le=4096)
    batches: tuple[Count, ...] = (1, 32)
    length: Count = 64
    runs: Count = 20
    cost: bool = Field(default=False, description="also the peak memory of a fresh process, and energy by codecarbon")


class Use(_Part):
    """A method with its weight and settings; in YAML also its bare name."""

    name: str
    weight: float = Field(default=1.0, ge=0)
    settings: Mapping[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`kd` and `{name: kd, temperature: 4}`: what is no field of this class is a setting of the method."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "settings" not in value:
            own = {key: item for key, item in value.items() if key in ("name", "weight")}
            return own | {"settings": {key: item for key, item in value.items() if key not in own}}
        return value


class Recipe(_Part):
    """All of a compression."""

    task: Literal["text-classification"]
    teacher: Place
    data: Data
    student: Student
    output: Place = Field(default="compressed", description="folder; the student lies in it as student/")
    teacher_training: Fitting | None = Field(default=None, description="fine-tune the teacher on the labels first")
    methods: tuple[Use, ...] = Field(default=(), description="empty: the default of the task")
    alpha: float | None = Field(default=None, ge=0, le=1)
    task_weight: float | None = Field(default=None, ge=0)
    training: Fitting = Fitting()
    labelled_only: bool = Field(default=False, description="distil on the labelled rows alone too, to compare")
    alone: Baseline | None = None
    export: Export = Export()
    measure: Measure = Measure()
    push: str | None = Field(default=None, description="repository, or its URL")
    private: bool | None = None
    licence: Text | None = Field(default=None, description="of the student; None: as teacher and data allow")
    seed: int = Field(default=0, ge=0, lt=2**32)


PartT = TypeVar("PartT", bound=BaseModel)


def read_recipe(path: Path) -> Recipe:
    """A recipe from its file, paths made absolute.

    Raises:
        UnknownNameError: for an unknown key, with the nearest ones.
        ForeignFileError: for a malformed file or value, naming the key.
    """
    recipe = validated(Recipe, files.read_yaml(path), path.name)
    base = path.parent.absolute()
    rows = {
        key: str(base / value)
        for key in ("train", "unlabelled", "choice", "test")
        if (value := getattr(recipe.data, key)) is not None
    }
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update=rows), "output": str(base / recipe.output)}
    if (base / recipe.teacher).is_dir():
        changes["teacher"] = str(base / recipe.teacher)
    return recipe.model_copy(update=changes)


def validated(kind: type[PartT], value: Mapping[str, Any], where: str) -> PartT:
    """A part of a recipe from plain values; errors as `read_recipe`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            *above, last = map(str, first["loc"])
            part = f"key of {'.'.join(above)} in {where}" if above else f"key in {where}"
            parent = _model_at(kind, first["loc"][:-1])
            raise UnknownNameError(part, last, parent.model_fields) from error
        raise ForeignFileError(where, f"{key}: {first['msg']}.", "Mend the value.") from error


def _model_at(kind: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The class that validated the part at that place."""
    for key in path:
        if not isinstance(key, str) or key not in kind.model_fields:
            continue
        found = kind.model_fields[key].annotation
        options = [found, *getattr(found, "__args__", ())]
        kind = next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), kind)
    return kind


def objectives(recipe: Recipe) -> list[Any] | None:
    """The objectives that the recipe names; None for the default of the task. Errors as `named`."""
    return named(recipe.methods, recipe.task) or None


def named(uses: Sequence[Use], task: str) -> list[Any]:
    """Objectives by their names and settings.

    Raises:
        UnknownNameError: for a method that does not exist.
        ConfigurationError: for one without an objective, or a setting that it does not have.
    """
    from . import registry

    made = []
    for use in uses:
        entry = registry.get(use.name)
        if task not in entry.tasks:
            raise ConfigurationError(
                f"recipe: method {use.name!r} is for {', '.join(entry.tasks)}, not for {task}. "
                f"`hf-compress methods --task {task}` lists those that are."
            )
        settings = {key: tuple(item) if isinstance(item, list) else item for key, item in use.settings.items()}
        kind = registry.objective(use.name)
        try:
            made.append(kind(weight=use.weight, **settings))
        except HfCompressError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:  # a text where a number belongs, or one out of range
            raise ConfigurationError(f"recipe: method {use.name!r} does not take {settings}: {error}.") from error
    return made
