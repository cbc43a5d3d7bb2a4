"""Why weights are not packed: of several reasons one is said, and none where there is none."""

from __future__ import annotations

import pytest
from weightstream.streaming import StreamingConfig
from weightstream.streaming.obstacles import Decoder, find_obstacle


def test_usual_settings_are_no_obstacle() -> None:
    assert find_obstacle(StreamingConfig(), Decoder()) == ""
    assert find_obstacle(StreamingConfig(), Decoder(1e9, slow="there is no compiler")) == ""


@pytest.mark.parametrize(
    ("pins", "failure", "text"),
    [
        (False, "", "they are not page-locked"),
        (True, "no memory", "they cannot be packed (no memory)"),
        (False, "no memory", "they are not page-locked"),
    ],
)
def test_one_reason_is_said(pins: bool, failure: str, text: str) -> None:
    assert find_obstacle(StreamingConfig(pin_memory=pins), Decoder(failure=failure)) == text
