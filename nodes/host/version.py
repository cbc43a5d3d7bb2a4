"""The pack's version, as pyproject.toml has it (a test sees to that)."""

VERSION = "0.1.0"
