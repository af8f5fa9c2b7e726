import os

# Before anything of transformers or matplotlib is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from cases import BY_NAME
from transformers.utils import logging

logging.set_verbosity_error()
# Tiny models only lose time to threads that wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same state and leaves the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def bert():
    """A BERT that no test may change."""
    return BY_NAME["bert"].build()


ROUTERS = "a router's factor is refused once tokens have been picked"
