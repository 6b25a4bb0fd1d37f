"""Patterns of an adapter's config: as Python's own engine matches them, in bounded time."""

import random
import re
import time

import pytest

from sam2_lora_ext.adapters.name_patterns import NamePatterns
from sam2_lora_ext.utils.errors import UserError

NAMES = [
    "image_encoder.trunk.blocks.0.attn.qkv",
    "image_encoder.trunk.blocks.11.attn.proj",
    "a",
    "",
    ".",
    "a.",
    ".a",
    "a.b",
    "sam_mask_decoder.transformer.layers.1.cross_attn_token_to_image.q_proj",
    "ab",
    "aab",
    "x.aab",
    "b.b.b",
    "layers1",
    "aaaa",
    "a-b.c",
]
PATTERNS = [
    "image_encoder.trunk.blocks.0.attn.qkv",
    "attn.qkv",
    "qkv",
    r"blocks\.\d+\.attn\.(qkv|proj)",
    r"^image_encoder.*qkv",
    r".*layers\.[0-9]\..*_proj$",
    ".*",
    "",
    "a|b",
    "(a|b)*",
    "a{2}b",
    "a{1,2}",
    "a{2,}",
    "a+?b",
    "[^.]+",
    "(?:a|ab)(?:b|)",
    "^a$",
    r"\w+",
    r"\W",
    r"[\d_]*",
    "a?a?aa",
    "(a*)*",
    "(a+)+b",
    "b$",
    "(^a|b)",
    r"[a-c.]+",
    "x?",
    "((a))",
    re.escape("a-b.c"),
    re.escape(NAMES[0]),
]

PIECES = ["a", "b", ".", r"\.", "*", "+", "?", "|", "(", ")", "[ab]", "[^a]", "^", "$", "{2}"]


def as_python(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_matches_as_pythons_own_engine(pattern):
    for name in NAMES:
        assert NamePatterns({pattern: 7}, "x").value(name, None) == (7 if as_python(pattern, name) else None), name


def test_random_patterns_match_as_pythons_own_engine():
    drawn = random.Random(20)
    checked = 0
    for _ in range(1500):
        pattern = "".join(drawn.choices(PIECES, k=drawn.randint(1, 7)))
        try:
            re.compile(pattern)
        except re.error:
            with pytest.raises(UserError, match="not a regular expression"):
                NamePatterns({pattern: 1}, "x").value("a", None)
            continue
        try:
            matcher = NamePatterns({pattern: 1}, "x")
        except UserError:  # possessive, such as a++
            continue
        for name in ("", "a", "ab", "a.b", "b.aa", "..", "abab"):
            assert matcher.value(name, 0) == as_python(pattern, name), (pattern, name)
            checked += 1
    assert checked > 2000


def test_the_first_that_matches_wins():
    patterns = NamePatterns({"a.b": 1, ".*b": 2, "c": 3}, "x")
    assert [patterns.value(name, 0) for name in ("x.a.b", "cb", "c", "d")] == [1, 2, 3, 0]
    assert NamePatterns(None, "x").value("a", 9) == 9


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(a*)*b",
        "(.*)*x",
        "(.*.*.*.*)*b",
        "a*" * 100 + "b",
        "(a?){100}a{100}",
        ".*" * 200 + "x",
        "(a|b|ab)*c",
    ],
)
def test_catastrophic_patterns_end_soon(pattern, monkeypatch):
    """A match, none, or a sentence; never minutes (here a tenth of the bound)."""
    monkeypatch.setattr("sam2_lora_ext.adapters.name_patterns.MOST_STEPS", 1_000_000)
    began = time.process_time()
    matcher = NamePatterns({f"{pattern}{number}": number for number in range(20)}, "adapter_config.json")
    try:
        for number in range(500):
            matcher.value("a." * 100 + "a" * 100 + str(number), None)
    except UserError as error:
        assert "takes too long" in str(error)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(a)\1", "bounded time"),
        ("(?=a)b", "bounded time"),
        ("(?<!a)b", "bounded time"),
        ("(?i:a)", "bounded time"),
        ("(?i)a", "sets flags"),
        ("(?x) a b", "sets flags"),
        (r"\ba", "bounded time"),
        ("(?>a+)b", "bounded time"),
        ("a++", "bounded time"),
        ("a" * 501, "501 characters"),
        ("((a{100}){100}){100}", "expands to more than"),
        ("a{1000000000}", "expands to more than"),
        ("(", "not a regular expression"),
        ("(" * 240 + "a" + ")" * 240, None),
        ("[", "not a regular expression"),
        ("a{99999999999999999999}", "not a regular expression"),
    ],
)
def test_what_cannot_be_bounded_is_refused(pattern, said):
    if said is None:
        assert NamePatterns({pattern: 1}, "x").value("a", None) == 1
        return
    with pytest.raises(UserError, match=said) as refused:
        NamePatterns({pattern: 1}, "adapter_config.json")
    assert "\n" not in str(refused.value)


def test_a_name_without_end_is_refused():
    with pytest.raises(UserError, match="100,000 characters"):
        NamePatterns({"a": 1}, "x").value("a" * 100_000, None)
