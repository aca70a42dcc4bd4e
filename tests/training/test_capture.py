"""Captured steps on a real GPU; skipped where there is none."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.compiler import needs_a_compiler
from training import data, device, recipe
from training.capture import WARM_UPS, Captured
from training.learner import Learner
from training.processes import Processes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# SGD with fp16's gradient scaler, Adam and a last batch of another size, AdamW, Muon and a selector, and
# what is not captured: Muon with the scaler.
SMALL = {
    "A2": ["model.widths=[16,16,16,16]"],
    "B2": ["model.widths=[16,16,16]"],
    "E1": ["model.widths=[16,16,16]"],
    "accurate": ["model.widths=[16,16,16]"],
    "fast": ["model.widths=[16,16,16]", "amp=fp16"],
}


def test_a_graph_computes_anew_from_each_call_s_values() -> None:
    total = torch.zeros(3, device="cuda")

    def add(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total.add_(values)
        return (total * 2,)

    captured = Captured(add)
    for count in range(1, WARM_UPS + 4):
        (doubled,) = captured(torch.full((3,), float(count), device="cuda"))
        assert doubled.tolist() == [count * (count + 1)] * 3


def test_a_graph_draws_from_the_seed_that_is_set_before_it() -> None:
    captured = Captured(lambda values: (F.dropout(values, 0.5),))
    masks = []
    for seed in (0, 1, 2, 3, 4, 5, 4):
        torch.manual_seed(seed)
        (dropped,) = captured(torch.ones(1000, device="cuda"))
        masks.append(dropped.tolist())
    assert masks[4] == masks[6]
    assert masks[3] != masks[4] != masks[5]


@needs_a_compiler
@pytest.mark.parametrize("name", SMALL)
def test_captured_steps_are_the_same_steps(name: str) -> None:
    chosen, images = recipe.load(name, [*SMALL[name], "batch_size=200"]), data.load_sample().train
    losses, networks = [], []
    for compiled in (False, True):
        learner = Learner(chosen, 0, images, Processes(), compiled=compiled)
        for epoch in learner.to_compile([0]):
            learner.compile(epoch)
        steps = (batch for epoch in itertools.count() for batch in learner.batches(epoch))
        losses.append(
            [
                learner.learn(batch, (0.1 - batch.epoch / 100).__mul__)[0].item() / batch.count
                for batch in itertools.islice(steps, (WARM_UPS + 2) * learner.steps)
            ]
        )
        networks.append(learner.result.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    eager, captured = (torch.cat([v.flatten().float() for v in each.values()]) for each in networks)
    assert (captured - eager).norm() < 0.01 * eager.norm()


def test_a_step_on_a_gpu_is_one_on_the_cpu() -> None:
    chosen, images = recipe.load("D1", ["model.widths=[16,16,16,16]"]), data.load_sample().train
    found = []
    for place in (torch.device("cpu"), device.choose()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "choose", lambda index=0, place=place: place)
            learner = Learner(chosen, 0, images, Processes(), compiled=False)
        batch = next(learner.batches(0))
        loss, _ = learner.learn(batch, float)
        found.append((batch.inputs.cpu(), loss.item()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3)
