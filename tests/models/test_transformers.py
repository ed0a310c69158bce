import pytest

from tests.models.check import check_model
from tests.models.zoo import TRANSFORMERS


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_compiles_unchanged(case):
    check_model(case)
