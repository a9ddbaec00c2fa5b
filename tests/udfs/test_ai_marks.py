"""Texts in a file that say a model made the picture."""

from __future__ import annotations

import pytest

from udfs.ai_marks import marks


@pytest.mark.parametrize(
    "name",
    [
        "Stable Diffusion XL",
        "ComfyUI",
        "Midjourney v6",
        "DALL-E 3",
        "DALL·E",
        "NovelAI Diffusion V3",
        "InvokeAI 4.2",
        "Adobe Firefly",
        "Google Imagen",
    ],
)
def test_a_generator_that_names_itself_is_a_mark(name: str) -> None:
    assert marks([("exif:Software", name)]) == [{"where": "exif:Software", "text": name}]
    assert marks([("png:Comment", f"made with {name}.")])


@pytest.mark.parametrize(
    "name",
    [
        "Adobe Photoshop 25.0",
        "GIMP 2.10",
        "Paint.NET",
        "Editor de Imagen",
        "Firefly Camera",
        "Adobe ImageReady",
        "darktable 4",
        "Kandinsky Museum",
    ],
)
def test_an_ordinary_program_is_no_mark(name: str) -> None:
    assert marks([("exif:Software", name), ("png:Software", name)]) == []


def test_a_key_that_only_generators_write_is_a_mark_whatever_it_says() -> None:
    assert marks([("png:parameters", ""), ("png:Workflow", "{}"), ("png:Title", "workflow")]) == [
        {"where": "png:parameters", "text": ""},
        {"where": "png:Workflow", "text": "{}"},
    ]


def test_a_mark_is_cut_to_200_characters_and_is_clean_text() -> None:
    (mark,) = marks([("png:prompt", "a\0b\ud800" + "x" * 500)])
    assert mark["text"] == "ab?" + "x" * 197
