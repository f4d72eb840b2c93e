import copy

import torch

from vaescale.nn.frozen import Frozen, weights_hash


def test_the_hash_is_that_of_all_parameters_and_buffers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = weights_hash(model)
    assert weights_hash(model) == before
    model[1].running_mean[0] += 1e-6  # type: ignore[index,operator]
    changed = weights_hash(model)
    assert changed != before
    with torch.no_grad():
        model[0].bias[1] += 1e-6  # type: ignore[index,operator]
    assert weights_hash(model) not in (before, changed)


def test_a_frozen_model_belongs_to_no_model_that_is_built_on_it() -> None:
    frozen = Frozen(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))
    owner = torch.nn.Linear(2, 2)
    owner.frozen = frozen
    assert len(owner.state_dict()) == len(list(owner.parameters())) == 2
    assert copy.deepcopy(owner).frozen is frozen
    model = frozen.on(torch.device("cpu"))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
