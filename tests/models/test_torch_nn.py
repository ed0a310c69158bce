import pytest

from tests.models.check import check_model
from tests.models.zoo import TORCH_NN


@pytest.mark.parametrize("case", TORCH_NN, ids=str)
def test_compiles_unchanged(case):
    check_model(case)
