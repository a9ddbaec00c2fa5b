"""What every section of the settings is made of, and the user's mistake."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")]
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


class Mistake(ValueError):
    """The user's mistake: the message says what was given, what was expected and what to do; shown without a stack trace."""


class Frozen(BaseModel):
    """A section: no unknown key, no change after loading, no silent type coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
