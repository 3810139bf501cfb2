import pytest
import torch
from torch import nn

from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.optim import WarmupCosine, configure_optimizers, parameter_groups


def test_what_decays_and_what_does_not() -> None:
    module = Mamba(d_model=8, n_layers=1)
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, spared = (
        {names[id(p)].rpartition("mixer.")[2] for p in g["params"]}
        for g in parameter_groups(module, 0.1)
    )
    assert decayed == {
        "in_proj.weight",
        "conv1d.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "out_proj.weight",
    }
    assert {"A_log", "D", "dt_proj.bias", "conv1d.bias"} <= spared
    assert parameter_groups(module, 0.1)[1]["weight_decay"] == 0.0
    assert len(parameter_groups(module, 0.0)) == 1


def test_warm_up_then_half_a_cosine() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    schedule = WarmupCosine(optimizer, warmup_steps=3, total_steps=13, min_factor=0.1)
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[13:] == pytest.approx([0.2, 0.2])


def test_specs_and_their_mistakes() -> None:
    module = nn.Linear(2, 2)
    adam = {"_target_": "torch.optim.Adam", "lr": 0.1}
    cosine = {
        "_target_": "recsys_ssm.models.optim.WarmupCosine",
        "warmup_steps": 1,
        "total_steps": 9,
    }
    made = configure_optimizers(module, adam, cosine)
    assert made["lr_scheduler"]["interval"] == "step"
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05)
    for spec, message in [
        ({**adam, "learning_rate": 1}, "optimizer.learning_rate: no such option"),
        ({"lr": 1}, "optimizer: no _target_"),
        ({"_target_": "torch.optim.Adamm"}, "torch.optim.Adamm"),
    ]:
        with pytest.raises(UserError, match=message):
            configure_optimizers(module, spec, None)
    with pytest.raises(UserError, match="total_steps=-1"):
        configure_optimizers(module, adam, {**cosine, "total_steps": -1})
