"""Loss scaling keeps gradients that fp16 would round to zero, skips a step that overflowed, and is saved with the optimizer."""

import torch

from jobs.training import loss_scaling


def scaled_optimizer() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss_scaling.install(optimizer)
    return weight, optimizer


def test_small_gradients_survive_fp16() -> None:
    weight, optimizer = scaled_optimizer()
    small = torch.full((4,), 1e-8)
    assert not small.half().any()
    ((weight * small).sum() * loss_scaling.scale(optimizer)).backward()
    weight.grad = weight.grad.half().float()  # rounded as in fp16
    loss_scaling.unscale(optimizer)
    torch.testing.assert_close(weight.grad, small, rtol=1e-3, atol=0)


def test_an_overflow_halves_the_scale_and_good_steps_double_it() -> None:
    _, optimizer = scaled_optimizer()
    assert not loss_scaling.update(optimizer, float("inf"))
    assert loss_scaling.scale(optimizer) == loss_scaling.INITIAL / 2
    assert not loss_scaling.update(optimizer, torch.tensor(float("nan")))
    for _ in range(loss_scaling.PATIENCE):
        assert loss_scaling.scale(optimizer) == loss_scaling.INITIAL / 4
        assert loss_scaling.update(optimizer, 1.0)
    assert loss_scaling.scale(optimizer) == loss_scaling.INITIAL / 2


def test_the_scale_is_resumed() -> None:
    _, optimizer = scaled_optimizer()
    loss_scaling.update(optimizer, float("inf"))
    _, other = scaled_optimizer()
    other.load_state_dict(optimizer.state_dict())
    assert loss_scaling.scale(other) == loss_scaling.INITIAL / 2


def test_without_fp16_nothing_is_scaled() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    assert loss_scaling.scale(optimizer) == 1
    assert loss_scaling.update(optimizer, float("inf"))
