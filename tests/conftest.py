import pytest
import torch as th


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Results do not depend on how many cores there are, and tiny networks are faster so."""
    th.set_num_threads(1)
