"""What is wrong with the settings that no section can see alone: found before Spark starts, not after hours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from conf.build import Select
from conf.section import Mistake
from conf.settings import Settings, load_detector, load_encoder
from jobs import deny_lists, facts
from udfs import degrade


def check(settings: Settings) -> None:
    """What one section cannot know of itself, before Spark starts. Raises Mistake."""
    _check_rules("select", settings.select.rules)
    _check_caps(settings.select)
    _check_sources_of_values(settings, "select", facts.used(settings.select))
    for tier in settings.captions.tiers:
        _check_rules(f"captions.tiers.{tier.name}", tier.rules)
        _check_sources_of_values(settings, f"captions.tiers.{tier.name}", [rule.value for rule in tier.rules])
    for key, views in (("views", settings.label.views), ("probes", settings.label.probes)):
        if unknown := set(views) - set(degrade.VIEWS):
            raise Mistake(f"label.{key}: given {sorted(unknown)}, allowed {sorted(degrade.VIEWS)}")
    for store in settings.stores.values():
        for variable in (store.access_key_env, store.secret_key_env):
            if variable is not None and variable not in os.environ:
                raise Mistake(f"stores: the environment variable {variable} is not set on this machine; set it here and on the workers")
    deny_lists.read(settings)
    _check_models(settings)


def _check_models(settings: Settings) -> None:
    """Raises Mistake when a file of an encoder or detector, or the engine's device, is not there; on a cluster only its workers can tell."""
    if not (settings.spark.master or "").startswith("local"):
        return
    if (settings.embed.device, settings.embed.engine_used) == ("cuda", "onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" not in (have := onnxruntime.get_available_providers()):
            raise Mistake(f"embed.engine: given onnxruntime with device cuda, but onnxruntime here has {have}; take engine torch")
    files = [("encoder", one.name, "weights", one.weights) for one in map(load_encoder, settings.embed.encoders)]
    for one in map(load_detector, settings.embed.detectors):
        files += [("detector", one.name, "weights", one.weights), ("detector", one.name, "vocabulary", one.vocabulary)]
    for kind, name, key, file in files:
        if file is not None and not Path(file).is_file():
            raise Mistake(f"{kind} {name}: {key}: no file at {file}; the demo's come from `make weights`")


def _check_rules(where: str, rules: Sequence[Select.Rule]) -> None:
    """Raises Mistake when a rule asks for a value that there is not, or asks it the wrong question."""
    for rule in rules:
        if rule.value not in facts.NUMBERS and rule.value not in facts.WORDS:
            known = sorted(facts.NUMBERS | facts.WORDS)
            raise Mistake(f"{where}.rules.{rule.name}: value: given {rule.value!r}, allowed {known}")
        numeric = rule.at_least is not None or rule.at_most is not None
        if numeric != (rule.value in facts.NUMBERS):
            fitting = "at_least and at_most" if rule.value in facts.NUMBERS else "within or none_of"
            raise Mistake(f"{where}.rules.{rule.name}: {rule.value} takes {fitting}")
        _check_words(f"{where}.rules.{rule.name}", rule.value, (*(rule.within or ()), *(rule.none_of or ())))


def _check_caps(settings: Select) -> None:
    """Raises Mistake when a cap asks for a value that is no list of words, or for a word that no image can have."""
    for cap in settings.caps:
        _check_words(f"select.caps.{cap.name}", cap.value, cap.words)
        for key, value in (("value", cap.value), ("per", cap.per)):
            if value is not None and value not in facts.WORDS:
                raise Mistake(f"select.caps.{cap.name}: {key}: given {value!r}, allowed {sorted(facts.WORDS)}")


def _check_words(where: str, value: str, words: Sequence[str]) -> None:
    """Raises Mistake for a word that no image can have: misspelt, it would let all pass or none."""
    if value in facts.CLOSED and (unknown := sorted(set(words) - set(facts.CLOSED[value]))):
        raise Mistake(f"{where}: {value}: given {unknown}, allowed {list(facts.CLOSED[value])}")


def _check_sources_of_values(settings: Settings, where: str, values: Iterable[str]) -> None:
    """Raises Mistake when nothing in this build could ever tell a value that is asked for: `none_of` would let all pass."""
    kernels = {load_detector(name).kernel for name in settings.embed.detectors}
    labels = {entry.label for entry in settings.classify}
    for value in values:
        wanted = facts.DETECTORS.get(value)
        if wanted is not None and not kernels & set(wanted):
            raise Mistake(f"{where}: {value} is told by a detector of kernel {' or '.join(wanted)}; embed.detectors has none")
        if value in facts.CLASSIFIERS and facts.CLASSIFIERS[value] not in labels:
            raise Mistake(f"{where}: {value} is told by a classifier of the labels {facts.CLASSIFIERS[value]!r}; classify has none")
        if value == "disagreement" and len(given := settings.compare_captioners.captioners) < 2:
            raise Mistake(
                f"{where}: disagreement is between the captioners of compare_captioners.captioners: at least two, given {list(given)}"
            )
