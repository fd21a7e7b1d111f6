import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))       # the tests check this tree, wherever another one is installed


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes or gigabytes; run with -m slow")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real photos and weights that SAE_TEST_DATA names; its tests skip where there is none."""
    if "SAE_TEST_DATA" not in os.environ:
        pytest.skip("SAE_TEST_DATA is unset: no real photos and weights")
    return Path(os.environ["SAE_TEST_DATA"])
