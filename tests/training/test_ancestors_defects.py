"""Defects of the first implementation of MoQ (DeepSpeed 0.4 to 0.16), each shown not to be here.

Those of its CUDA kernel are tested on a GPU as well: `device` is both.

What is tested at length elsewhere:

| defect there | tests |
|---|---|
| misspelt keys and nonsense values are swallowed | test_config, test_deepspeed, test_rules |
| periods in a unit that is no step; the tutorial's schedule never arrives | test_deepspeed |
| no planner; nobody hears of a schedule that does not finish | test_schedule, cpp/schedule |
| stochastic rounding crashes | ops/test_fake_quantize |
| replicas draw, measure and decide differently | test_optimizer_sharded |
| crashes in FP32, refuses BF16 and AMP, needs its own engine | test_optimizer_torch, test_resume |
| a second-order graph, and its leak, in every backward | test_sensitivity, test_hessian |
| an overflow step advances the schedule | test_optimizer_torch |
| a resumed run begins at start bits again | test_resume |
| masters are lost without a word | test_optimizer_state, test_loaded_weights |
| no integers are ever written; inference has another grid | export/test_export_equals_simulated |
"""

import json
import warnings

import pytest
import torch
from tiny_decoder import FALLING, assert_simulated, batch, loss_of, masters, train_step, wrap
from torch import nn

from moq import MoQOptimizer


def test_every_layer_keeps_its_own_width_between_measurements(decoder):
    """There all layers fell back to layer 0's width on each step without eigenvalues."""
    model = decoder(layers=3)
    optimizer = wrap(model, FALLING, total_steps=40)
    optimizer._masters.trainer.set_sensitivities([1.0, 0.0, 0.5])
    plan = optimizer.schedule().plan()
    seen = set()
    for step in range(40):
        widths = [optimizer.num_bits[f"layers.{i}.q_proj.weight"] for i in range(3)]
        assert widths == [[b for at, b in drops if at <= step][-1] for drops in plan]
        seen.add(len(set(widths)))
        assert_simulated(optimizer)
        train_step(model, optimizer, step)
    assert seen == {1, 2, 3}  # they did differ, up to all three of them


def test_an_embedding_that_comes_first_does_not_move_layer_0(decoder):
    """There it counted as layer 0, whose own sensitivity was then lost."""
    rules = [{"match": "embedding", "modules": ["embedding"]}]
    optimizers = [
        wrap(decoder(), config, total_steps=40) for config in (FALLING, FALLING | {"rules": rules})
    ]
    optimizers[0]._masters.trainer.set_sensitivities([0.4, 1.0])
    optimizers[1]._masters.trainer.set_sensitivities([0.0, 0.4, 1.0])
    names, plan = optimizers[1].schedule().block_names, optimizers[1].schedule().plan()
    assert names[0] == "embedding"
    assert plan[1:] == optimizers[0].schedule().plan()
    assert plan[0] != plan[1]


@pytest.mark.parametrize(
    ("granularity", "sizes"),
    [("per_tensor", (1024, 4096)), ("per_channel", (1_048_581, 2)), ("per_tensor", (3, 349_527))],
)
def test_a_large_group_is_quantized(device, granularity, sizes):
    """There a group of more than 1,048,576 weights was returned unchanged, without a message."""
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=False).to(device)
    before = layer.weight.detach().clone()
    config = {"start_bits": 8, "target_bits": 8, "granularity": granularity}
    wrap(layer, config, total_steps=1)
    after = layer.weight.detach()
    groups = (before, after) if granularity == "per_channel" else ([before], [after])
    for group, written in zip(*groups, strict=True):
        assert group.numel() > 1_048_576
        step = group.abs().max() / 127
        codes = written / step
        assert len(codes.round().unique()) == 255
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert (written - group).abs().max() <= step * 0.5001


@pytest.mark.gpu
def test_one_group_is_the_work_of_the_whole_gpu(gpu, tmp_path):
    """There each group had one block of threads, and a matrix of one group all the time of one."""
    weight = torch.randn(4096, 1024, device=gpu)
    torch.ops.moq.fake_quantize(weight, 8, granularity="per_tensor")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.ops.moq.fake_quantize(weight, 8, granularity="per_tensor")
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    blocks = [
        event["args"]["grid"][0]
        for event in events
        if event.get("cat") == "kernel" and "moq" in event["name"]
    ]
    assert len(blocks) >= 2  # one finds the scale, one writes
    assert min(blocks) >= torch.cuda.get_device_properties(gpu).multi_processor_count


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_more_weights_than_a_32_bit_count_are_quantized_to_the_last(gpu, granularity):
    """There elements were counted in 32 bits."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    rows, columns = 2**31 // 4096 + 8, 4096
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device=gpu)
    torch.manual_seed(0)
    ends = torch.randn(32, columns, device=gpu).to(torch.bfloat16)
    weight[:16], weight[-16:] = ends[:16], ends[16:]
    found = torch.ops.moq.fake_quantize(weight, 4, granularity=granularity)
    expected = torch.ops.moq.fake_quantize(ends, 4, granularity=granularity)
    assert torch.equal(found[:16], expected[:16])
    assert torch.equal(found[-16:], expected[16:])
    assert not found[16:-16].any()


def test_an_odd_group_loses_no_remainder(device):
    """There the kernel dropped what was left over by groups of 4, 8 or 16 bytes."""
    torch.manual_seed(0)
    layer = nn.Linear(35, 3, bias=False).to(device)
    config = {"start_bits": 3, "target_bits": 3, "granularity": "per_group", "group_size": 5}
    wrap(layer, config, total_steps=1)
    for group in layer.weight.detach().reshape(-1, 5):
        step = group.abs().max() / 3
        torch.testing.assert_close(group / step, (group / step).round())


def test_the_largest_weight_is_not_clipped(device):
    """There the largest positive weight lost a step, and the CUDA kernel shifted every grid."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(device)
    before = layer.weight.detach().clone()
    wrap(layer, {"start_bits": 8, "target_bits": 8}, total_steps=1)
    largest = before.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(
        layer.weight.detach().gather(1, largest), before.gather(1, largest), rtol=1e-6, atol=0
    )


def test_nearest_is_nearest_and_stochastic_is_not(decoder, device):
    """There the kernel rounded stochastically whatever the configuration said."""
    written = {}
    for rounding in ("nearest", "stochastic"):
        model = decoder().to(device)
        config = {"start_bits": 4, "target_bits": 4, "rounding": rounding}
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = MoQOptimizer(still, model, config, total_steps=2, verbose=False)
        seen = []
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            seen.append(model.layers[0].q_proj.weight.detach().clone())
        written[rounding] = seen
        assert_simulated(optimizer)  # by the operator of the CPU
    assert torch.equal(*written["nearest"])
    assert not torch.equal(*written["stochastic"])
    step = masters(optimizer)["layers.0.q_proj.weight"].detach().abs().amax(1, keepdim=True) / 7
    moved = (written["stochastic"][0] - written["nearest"][0]) / step
    assert moved.abs().max() <= 1.0001  # up or down, to a neighbour


def test_one_layers_drop_leaves_another_layers_blend_alone():
    """There one ratio served the whole model, and any drop set it back to full precision."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"0": nn.Linear(16, 4, bias=False), "1": nn.Linear(16, 4, bias=False)})
    tables = {"0": {0: 6, 2: 3}, "1": {0: 6, 4: 3}}
    rules = [
        {"match": name, "blend_steps": 4, "schedule": {"table": table}}
        for name, table in tables.items()
    ]
    ratios = []

    class Logger:
        def log(self, scalars, step):
            ratios.append([scalars[f"moq/blend_ratio/{name}"] for name in tables])

    optimizer = MoQOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        {"start_bits": 6, "target_bits": 3, "rules": rules},
        total_steps=10,
        verbose=False,
        loggers=Logger(),
        log_every=1,
    )
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    expected = [[0, 0], [1, 0], [0.75, 0], [0.5, 1], [0.25, 0.75], [0, 0.5], [0, 0.25]]
    assert ratios == expected + [[0, 0]] * 3


@pytest.mark.parametrize("blend_steps", [0, 3])
def test_a_training_ends_on_the_grid(decoder, blend_steps):
    """There a run shorter than the blend ended with weights off the grid."""
    model = decoder(hidden=80, intermediate=80)
    optimizer = wrap(model, FALLING | {"blend_steps": blend_steps}, total_steps=20)
    for step in range(20):
        train_step(model, optimizer, step)
    for name in optimizer.num_bits:
        assert max(len(row.unique()) for row in model.get_parameter(name).detach()) <= 15
    optimizer.quantized_parameters()  # refuses weights that still blend


def test_micro_batches_are_no_steps(decoder):
    """There each micro-batch of the first step counted, and elsewhere each matrix."""
    model = decoder()
    config = FALLING | {"sensitivity": {"rule": "none"}, "schedule": {"period": 2, "growth": 1.0}}
    optimizer = wrap(model, config, total_steps=10)
    for step in range(10):
        assert optimizer.num_bits["layers.1.down_proj.weight"] == max(9 - step // 2, 4)
        for part in batch(step).chunk(4):
            loss_of(model, part).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_measuring_leaves_dropout_as_it_would_have_been(decoder, device):
    """There the CPU's random state was put back after a draw on the GPU's."""
    model = decoder().to(device)
    optimizer = wrap(model, FALLING)
    drawn = []

    def loss_fn(tokens):
        drawn.append(torch.rand(3, device=device))  # as a dropout of the model's own would
        return loss_of(model, tokens)

    torch.manual_seed(3)
    expected = torch.rand(5), torch.rand(5, device=device)
    torch.manual_seed(3)
    optimizer.probe(loss_fn, [batch(50)], max_products=4, max_cost=None)
    assert drawn
    for values in expected:
        assert torch.equal(torch.rand(5, device=values.device), values)


def test_sensitivities_reach_tensorboard(decoder, tmp_path):
    """There eigenvalues and TensorBoard together crashed on an attribute that did not exist."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from moq.loggers import TensorBoardLogger

    model = decoder()
    optimizer = wrap(model, FALLING, loggers=TensorBoardLogger(tmp_path))
    found = optimizer.probe(
        lambda tokens: loss_of(model, tokens),
        [batch(50)],
        measure="eigenvalue",
        max_products=4,
        max_cost=None,
    )
    optimizer.flush_logs()  # the writer has a thread of its own
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, value in zip(found.blocks, found.normalised, strict=True):
        (event,) = events.Scalars(f"moq/sensitivity/{name}")
        assert event.value == pytest.approx(value)


def test_no_step_allocates_weights_anew(decoder):
    """There every step made a new tensor for every parameter, beside the flat buffer."""
    model = decoder()
    optimizer = wrap(model, FALLING | {"rounding": "stochastic"})
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    kept = {name: master.data_ptr() for name, master in masters(optimizer).items()}
    for step in range(4):
        train_step(model, optimizer, step)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {name: master.data_ptr() for name, master in masters(optimizer).items()} == kept


def test_nothing_quantized_is_said(decoder):
    """There a block that nobody read any more meant full precision and silence."""
    with pytest.warns(UserWarning, match="no weight is quantized"):
        wrap(nn.LayerNorm(4), {}, total_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(decoder(), {}, total_steps=10)


def test_float32_has_schedule_blend_and_stochastic_rounding_together(decoder):
    """There training in FP32 went to the target bits at once, without any of the three."""
    model = decoder(torch.float32)
    config = FALLING | {"rounding": "stochastic", "blend_steps": 2}
    optimizer = wrap(model, config, total_steps=20)
    widths = []
    for step in range(20):
        train_step(model, optimizer, step)
        widths.append(optimizer.num_bits["layers.0.q_proj.weight"])
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 3
    assert widths[-1] == 4


def test_an_exported_checkpoint_is_smaller(tmp_path):
    """There a "quantized" checkpoint was as large as one in half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    optimizer = wrap(model, {"start_bits": 9, "target_bits": 8}, total_steps=4)
    for step in range(4):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.export(tmp_path / "int8")
    size = (tmp_path / "int8" / "model.safetensors").stat().st_size
    assert size < 1.05 * sum(p.numel() for p in model.parameters()) + 8192
