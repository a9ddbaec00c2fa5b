"""What is wrong with the settings that no section can see alone: found before Spark starts, not after hours."""

from __future__ import annotations

import os
from pathlib import Path

from conf.section import Mistake
from conf.settings import Select, Settings, load_encoder
from jobs import facts
from udfs import degrade


def check(settings: Settings) -> None:
    """What one section cannot know of itself, before Spark starts. Raises Mistake."""
    _check_rules(settings.select)
    unknown = set(settings.label.views) - set(degrade.VIEWS)
    if unknown:
        raise Mistake(f"label.views: given {sorted(unknown)}, allowed {sorted(degrade.VIEWS)}")
    for store in settings.stores.values():
        for variable in (store.access_key_env, store.secret_key_env):
            if variable is not None and variable not in os.environ:
                raise Mistake(f"stores: the environment variable {variable} is not set on this machine; set it here and on the workers")
    for encoder in map(load_encoder, settings.embed.encoders):
        if encoder.weights is not None and (settings.spark.master or "").startswith("local") and not Path(encoder.weights).is_file():
            raise Mistake(f"encoder {encoder.name}: weights: no file at {encoder.weights}; the demo's come from `make weights`")


def _check_rules(settings: Select) -> None:
    """Raises Mistake when a rule asks for a value that there is not, or asks it the wrong question."""
    for rule in settings.rules:
        if rule.value not in facts.NUMBERS and rule.value not in facts.WORDS:
            known = sorted(facts.NUMBERS | facts.WORDS)
            raise Mistake(f"select.rules.{rule.name}: value: given {rule.value!r}, allowed {known}")
        numeric = rule.at_least is not None or rule.at_most is not None
        if numeric != (rule.value in facts.NUMBERS):
            fitting = "at_least and at_most" if rule.value in facts.NUMBERS else "within or none_of"
            raise Mistake(f"select.rules.{rule.name}: {rule.value} takes {fitting}")
