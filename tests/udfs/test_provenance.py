"""What XMP packets and C2PA manifests say of how a picture was made, found in every format that carries them, in bounded time."""

from __future__ import annotations

import json
import time

import pytest

from tests.marked_images import IPTC, KINDS, box, store, superbox, with_c2pa, with_long_xmp, with_xmp, xmp
from tests.odd_images import LIMITS, encoded, picture
from udfs import file_layout, header, provenance

MADE = {"action": "c2pa.created", "digitalSourceType": IPTC + "trainedAlgorithmicMedia", "when": "2026-01-01T00:00:00Z"}
MARK = {"where": "c2pa:digitalSourceType", "text": IPTC + "trainedAlgorithmicMedia"}


def marks(data: bytes) -> list[dict[str, str]]:
    return header.probe(data, LIMITS).ai_marks


def element(value: str) -> bytes:
    return xmp(elements=f"<Iptc4xmpExt:DigitalSourceType>{value}</Iptc4xmpExt:DigitalSourceType>")


@pytest.mark.parametrize("kind", KINDS)
def test_iptcs_digital_source_type_in_xmp_is_a_mark_in_every_format(kind: str) -> None:
    assert marks(with_xmp(kind, element(IPTC + "trainedAlgorithmicMedia"))) == [
        {"where": "xmp:DigitalSourceType", "text": IPTC + "trainedAlgorithmicMedia"}
    ]
    assert marks(with_xmp(kind, element(IPTC + "digitalCapture"))) == []


@pytest.mark.parametrize(
    "packet",
    [
        xmp(f'Iptc4xmpExt:DigitalSourceType="{IPTC}algorithmicMedia"'),
        xmp(f"Iptc4xmpExt:DigitalSourceType = '{IPTC}algorithmicMedia'"),
        xmp(elements=f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{IPTC}algorithmicMedia"/>'),
        element(f"\n   {IPTC}algorithmicMedia\n  "),
        element(IPTC.replace("/", "&#x2F;").replace("http:", "https:") + "algorithmicMedia"),
        element("digsrctype:algorithmicMedia"),
    ],
)
def test_a_property_is_read_in_each_way_that_rdf_writes_it(packet: bytes) -> None:
    (mark,) = marks(with_xmp("JPEG", packet))
    assert mark["where"] == "xmp:DigitalSourceType" and mark["text"].endswith("algorithmicMedia")


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("trainedAlgorithmicMedia", True),
        ("compositeWithTrainedAlgorithmicMedia", True),
        ("compositeSynthetic", True),
        ("algorithmicMedia", True),
        ("digitalCapture", False),
        ("computationalCapture", False),
        ("humanEdits", False),
        ("algorithmicallyEnhanced", False),
        ("digitalCreation", False),
        ("composite", False),
        ("compositeCapture", False),
        ("screenCapture", False),
    ],
)
def test_the_source_types_that_say_a_model_are_marks_and_the_others_none(name: str, telling: bool) -> None:
    assert bool(marks(with_xmp("PNG", element(IPTC + name)))) == telling
    assert bool(marks(with_c2pa("PNG", store([MADE | {"digitalSourceType": IPTC + name}])))) == telling


def test_a_program_that_names_itself_in_xmp_is_judged_as_elsewhere() -> None:
    told = xmp('xmp:CreatorTool="Adobe Photoshop 25.0"', "<photoshop:Credit>Made with Google AI</photoshop:Credit>")
    assert marks(with_xmp("WEBP", told)) == [{"where": "xmp:Credit", "text": "Made with Google AI"}]
    assert marks(with_xmp("JPEG", xmp("", "<xmp:CreatorTool>GIMP 2.10</xmp:CreatorTool>"))) == []


def test_a_packet_in_parts_and_one_that_is_compressed_are_read() -> None:
    packet = xmp(elements=" " * 3_000 + element(IPTC + "trainedAlgorithmicMedia").decode())
    assert len(marks(with_long_xmp(packet))) == 1
    assert len(marks(with_xmp("PNG", packet, zipped=True))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_action_of_a_c2pa_manifest_that_names_a_model_is_a_mark_and_a_signed_photograph_has_none(kind: str) -> None:
    assert marks(with_c2pa(kind, store([MADE], {"claim_generator": "a camera/1.0"}))) == [MARK]
    captured = MADE | {"digitalSourceType": IPTC + "digitalCapture"}
    assert marks(with_c2pa(kind, store([captured], {"claim_generator": "Leica M11-P/2.1 c2pa-rs/0.25"}))) == []
    assert marks(with_c2pa(kind, store())) == []


def test_a_store_over_many_segments_of_a_jpeg_is_put_together_whatever_the_cut() -> None:
    for thumbnail in (63_500, 63_700, 63_840, 200_000):
        assert marks(with_c2pa("JPEG", store([MADE], thumbnail=thumbnail))) == [MARK], thumbnail


@pytest.mark.parametrize(
    "claim",
    [
        {"claim_generator": "Adobe_Firefly/1.0 adobe_c2pa/0.7.6"},
        {"claim_generator_info": [{"name": "Adobe Firefly", "version": "1.0"}]},
        {"claim_generator_info": {"name": "DALL-E 3"}},
        {"claim_generator": "x" * 200 + " Midjourney"},
    ],
)
def test_a_claim_generator_that_is_a_known_model_is_a_mark(claim: dict[str, str]) -> None:
    (mark,) = marks(with_c2pa("PNG", store(None, claim)))
    assert mark["where"] == f"c2pa:{next(iter(claim))}"


def test_a_software_agent_and_an_assertion_in_json_are_read() -> None:
    agent = {"action": "c2pa.created", "softwareAgent": {"name": "gpt-image-1", "version": "1"}}
    assert marks(with_c2pa("PNG", store([agent]))) == [{"where": "c2pa:softwareAgent", "text": "gpt-image-1"}]
    told = json.dumps({"@type": "x", "Iptc4xmpExt:DigitalSourceType": IPTC + "compositeWithTrainedAlgorithmicMedia"}).encode()
    (mark,) = marks(with_c2pa("WEBP", store(None, None, superbox(b"json", "stds.iptc", box(b"json", told)))))
    assert mark == {"where": "c2pa:digitalSourceType", "text": IPTC + "compositeWithTrainedAlgorithmicMedia"}


def test_the_same_words_outside_of_a_manifest_are_no_mark() -> None:
    other = superbox(b"json", "c2pa-like", box(b"json", b'"digitalSourceType":"' + IPTC.encode() + b'trainedAlgorithmicMedia"'))
    for data in (with_c2pa("PNG", other), with_c2pa("JPEG", other), encoded(picture(), "JPEG", comment=store([MADE]))):
        assert marks(data) == []


@pytest.mark.parametrize("word", [b"digitalSourceType", b"claim_generator", b"softwareAgent", b"\x78\xff", b"name"])
def test_a_store_full_of_what_is_searched_for_is_read_in_bounded_time(word: bytes) -> None:
    data = with_c2pa("PNG", superbox(b"c2pa", "c2pa", word * (40 * 2**20 // len(word))))
    start = time.process_time()
    texts = file_layout.read(data, "PNG", 1).texts
    assert time.process_time() - start < 0.5
    assert len(texts) <= provenance.MAX_TEXTS


@pytest.mark.parametrize("word", [b" ", b":Credit", b":Credit>", b":DigitalSourceType  ", b":Credit" + b" " * 64, b":CreatorTool='"])
def test_a_packet_full_of_what_is_searched_for_is_read_in_bounded_time(word: bytes) -> None:
    data = with_xmp("PNG", b":Credit" + word * (2**21 // len(word)), zipped=True)
    start = time.process_time()
    file_layout.read(data, "PNG", 1)
    assert time.process_time() - start < 0.5


def test_a_block_cut_anywhere_says_what_it_says_or_nothing() -> None:
    for whole, add in ((store([MADE]), "add_c2pa"), (element(IPTC + "trainedAlgorithmicMedia"), "add_xmp")):
        for length in range(0, len(whole), 7):
            blocks = provenance.Blocks()
            getattr(blocks, add)(whole[:length])
            assert all(text in whole.decode("latin-1") for _, text in blocks.texts())
    for length in range(40):
        blocks = provenance.Blocks()
        blocks.add_app11((b"JP\0\1\0\0\0\1" + store([MADE]))[:length])
        blocks.add_app1((provenance.XMP_EXTENSION + b"x" * 9)[:length])
        blocks.texts()
