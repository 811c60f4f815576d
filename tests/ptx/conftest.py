"""Options of these tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-classes",
        action="store_true",
        help="execute blocks of all shape classes: minutes. Default: some of them",
    )
