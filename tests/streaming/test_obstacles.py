"""Why weights are not packed: of several reasons one is said, and none where there is none."""

from __future__ import annotations

import pytest
from weightstream.streaming import StreamingConfig
from weightstream.streaming.obstacles import Decoder, find_obstacle


def test_usual_settings_are_no_obstacle() -> None:
    assert find_obstacle(StreamingConfig(), 1, Decoder()) == ""
    assert find_obstacle(StreamingConfig(), 1, Decoder(1e9, slow="there is no compiler")) == ""


@pytest.mark.parametrize(
    ("links", "decoder", "text"),
    [
        (2, Decoder(), "they come over 2 links"),
        (1, Decoder(failure="no memory"), "they cannot be packed (no memory)"),
        (2, Decoder(failure="no memory"), "they come over 2 links"),
    ],
)
def test_one_reason_is_said(links: int, decoder: Decoder, text: str) -> None:
    assert find_obstacle(StreamingConfig(), links, decoder) == text
