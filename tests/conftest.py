import os
import sys
from pathlib import Path

import pytest

# On a machine with a GPU the tests are those of the CPU, too: two ranks share no GPU, and cuDNN does not
# repeat its bits. tests/gpu.sh runs the ones that are for a GPU.
if "SAE_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# The tests check this tree, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes or gigabytes; run with -m slow")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real photos and weights that SAE_TEST_DATA names; its tests skip where there is none."""
    if "SAE_TEST_DATA" not in os.environ:
        pytest.skip("SAE_TEST_DATA is unset: no real photos and weights")
    return Path(os.environ["SAE_TEST_DATA"])
