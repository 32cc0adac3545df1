"""Evaluation mode for a while."""

import pytest
from torch import nn

from hf_onebit.modes import evaluating


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails: bool) -> None:
    """A frozen part stays in evaluation mode; a layer that came in meanwhile is as the model."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), nn.Linear(3, 3))
    model[1].eval()
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            model[2] = nn.Linear(3, 3).eval()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [module.training for module in model] == [True, False, True]
    assert not any(module.training for module in model[1])


def test_a_model_that_is_evaluated_stays_so() -> None:
    model = nn.Sequential(nn.Dropout())
    model.eval()
    with evaluating(model):
        assert not model.training
    assert not any(module.training for module in model.modules())
