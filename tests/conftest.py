import os

# Before anything of transformers or matplotlib is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# One thread for BLAS too, here and in processes that tests start: the cores are shared
# by pytest's workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from cases import BY_NAME
from hypothesis import settings
from transformers.utils import logging

logging.set_verbosity_error()
# Tiny models only lose time to threads that wait for each other.
torch.set_num_threads(1)

# Examples of every property: few while working, many in CI. Models make some of them
# slow, and workers share the cores: there is no deadline.
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


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
