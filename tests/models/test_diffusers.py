import pytest

from tests.models.check import check_model
from tests.models.zoo import DIFFUSERS


@pytest.mark.parametrize("case", DIFFUSERS, ids=str)
def test_compiles_unchanged(case):
    check_model(case)
