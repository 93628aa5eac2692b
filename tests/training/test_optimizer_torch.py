"""The wrapper as a torch optimizer: with the tools of torch that take one."""

import itertools
import warnings

import pytest
import torch
from tiny_decoder import (
    FALLING,
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    masters,
    train_step,
    weights,
    wrap,
)
from torch import nn

from moq import MoQOptimizer


def test_it_is_a_torch_optimizer_over_the_models_parameters(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    assert isinstance(optimizer, torch.optim.Optimizer)
    shown = list(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))
    assert [id(p) for p in shown] == [id(p) for p in model.parameters()]
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.defaults == optimizer.inner.defaults


def test_its_text_shows_widths_and_groups_and_no_record(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    text = repr(optimizer)
    (bits,) = set(optimizer.num_bits.values())
    weights_shown = f"weights: {len(optimizer.num_bits)} at {bits} bits"
    assert f"inner: AdamW\nstep: 1\n{weights_shown}\n" in text
    assert "    lr: " in text
    assert "moq:" not in text
    assert all(len(line) < 100 for line in text.splitlines())


def test_learning_rate_schedulers_reach_the_inner_optimizer(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = []
    for step in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the scheduler warns if it does not see step() called
            train_step(model, optimizer, step)
            scheduler.step()
        rates.append(optimizer.inner.param_groups[0]["lr"])
    assert rates == [5e-3, 2.5e-3, 1.25e-3]


def test_a_learning_rate_of_zero_in_warm_up_is_a_step_all_the_same(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    assert optimizer.param_groups[0]["lr"] == 0
    train_step(model, optimizer, 0)
    assert optimizer.steps == 1


def test_gradients_accumulate_until_the_step(decoder):
    once, twice = decoder(), decoder()
    first, second = wrap(once, FALLING, lr=0.1), wrap(twice, FALLING, lr=0.1)
    for step in range(3):
        (loss_of(once, batch(step)) + loss_of(once, batch(step + 10))).backward()
        for tokens in (batch(step), batch(step + 10)):
            loss_of(twice, tokens).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert first.steps == second.steps == 3
    for name, value in masters(first).items():
        torch.testing.assert_close(masters(second)[name], value, rtol=1e-4, atol=1e-6)


def test_zero_grad_frees_gradients_and_masters_keep_none(decoder):
    model = decoder(torch.bfloat16)
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    assert all(p.grad is None for p in model.parameters())
    assert all(master.grad is None for master in masters(optimizer).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clip_grad_norm_bounds_what_reaches_the_masters(decoder, dtype):
    model = decoder(dtype)
    optimizer = MoQOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model, FALLING, total_steps=5, verbose=False
    )
    before = {name: value.detach().clone() for name, value in masters(optimizer).items()}
    loss_of(model, batch(0)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    moved = [(masters(optimizer)[name] - value).square().sum() for name, value in before.items()]
    assert 0 < torch.stack(moved).sum().sqrt() <= 1.01e-3


def test_a_closure_is_evaluated_once_at_the_simulated_values(decoder):
    model, by_hand = decoder(), decoder()
    optimizer, expected = wrap(model, FALLING), wrap(by_hand, FALLING)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        calls.append(weights(model))
        return loss

    before = weights(model)
    loss = optimizer.step(closure)
    assert loss.item() == train_step(by_hand, expected, 0)
    assert len(calls) == 1
    assert_same(calls[0], before)
    assert_same(weights(model), weights(by_hand))


def test_lbfgs_is_refused_with_the_reason(decoder):
    model = decoder()
    with pytest.raises(ValueError, match="got LBFGS: its line search"):
        MoQOptimizer(torch.optim.LBFGS(model.parameters()), model, total_steps=5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda o, m: ((m, m), {"total_steps": 5}), TypeError, "optimizer must be a torch.optim"),
        (lambda o, m: ((o, o), {"total_steps": 5}), TypeError, "model must be a torch.nn.Module"),
        (lambda o, m: ((o, m), {"total_steps": 0}), ValueError, "total_steps must be at least 1"),
        (lambda o, m: ((o, m), {"total_steps": 2.5}), TypeError, "total_steps must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(decoder, arguments, error, message):
    model = decoder()
    positional, named = arguments(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(error, match=message):
        MoQOptimizer(*positional, **named)


def test_a_wrapper_is_not_wrapped_again(decoder):
    model = decoder()
    with pytest.raises(TypeError, match="must not be a MoQOptimizer already.*add_param_group"):
        MoQOptimizer(wrap(model, FALLING), model, total_steps=5)


def test_step_hooks_run_once_a_step(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train_step(model, optimizer, 0)
    assert calls == ["before", "after"]


def test_param_groups_added_later_are_quantized_by_the_same_rules(decoder):
    model = decoder()
    first = [p for name, p in model.named_parameters() if not name.startswith("layers.1")]
    with pytest.warns(UserWarning, match="6 weights match the rules but are in no param group"):
        optimizer = MoQOptimizer(
            torch.optim.AdamW(first, lr=1e-2), model, FALLING, total_steps=12, verbose=False
        )
    train_step(model, optimizer, 0)
    assert len(optimizer.num_bits) == 6
    kept = {name: value.clone() for name, value in masters(optimizer).items()}
    optimizer.add_param_group({"params": list(model.layers[1].parameters()), "lr": 1e-3})
    assert len(optimizer.num_bits) == 12
    assert optimizer.steps == 1
    assert_same({name: masters(optimizer)[name] for name in kept}, kept)
    for step in range(1, 12):
        assert_simulated(optimizer)
        train_step(model, optimizer, step)
    assert set(optimizer.num_bits.values()) == {4}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]


def test_a_param_group_may_bring_another_pace_into_a_known_layer(decoder):
    config = FALLING | {"rules": [{"match": "*.down_proj", "target_bits": 6}]}
    model, whole = decoder(), decoder()
    later = [layer.down_proj for layer in model.layers]
    held = {id(p) for layer in later for p in layer.parameters()}
    with pytest.warns(UserWarning, match="no param group"):
        adamw = torch.optim.AdamW(p for p in model.parameters() if id(p) not in held)
        optimizer = MoQOptimizer(adamw, model, config, total_steps=12, verbose=False)
    optimizer._masters.trainer.set_sensitivities([0.25, 0.75])
    train_step(model, optimizer, 0)
    optimizer.add_param_group({"params": [p for layer in later for p in layer.parameters()]})
    expected = wrap(whole, config)
    names = optimizer.schedule().block_names
    assert names == expected.schedule().block_names
    assert names[0] == "layers.0 (9 to 4 bits)"
    assert optimizer.schedule().state_dict()["measurements"][0]["sensitivities"] == [
        0.25 * ("layers.0 (9 to 4" in name) + 0.75 * ("layers.1 (9 to 4" in name) for name in names
    ]
    for step in range(1, 12):
        train_step(model, optimizer, step)
    assert {bits for name, bits in optimizer.num_bits.items() if "down" in name} == {6}
    assert {bits for name, bits in optimizer.num_bits.items() if "down" not in name} == {4}


def test_a_param_group_is_added_outside_full_precision_and_to_what_the_model_holds(decoder):
    model = decoder()
    with pytest.warns(UserWarning, match="no param group"):
        adamw = torch.optim.AdamW(model.layers[0].parameters())
        optimizer = MoQOptimizer(adamw, model, FALLING, total_steps=12, verbose=False)
    group = {"params": list(model.layers[1].parameters())}
    with optimizer.full_precision():
        with pytest.raises(RuntimeError, match="add_param_group: must be called outside full_prec"):
            optimizer.add_param_group(group)
        assert_same(masters(optimizer), {n: weights(model)[n] for n in masters(optimizer)})
    assert len(optimizer.param_groups) == 1
    replaced = torch.full_like(model.layers[0].q_proj.weight, 0.25)
    with torch.no_grad():
        model.layers[0].q_proj.weight.copy_(replaced)
    with pytest.warns(UserWarning, match="were replaced from outside"):
        optimizer.add_param_group(group)
    assert torch.equal(masters(optimizer)["layers.0.q_proj.weight"], replaced)
    assert_simulated(optimizer)


def test_a_param_group_that_is_refused_leaves_everything_as_it_was(decoder):
    model = decoder()
    first = [p for name, p in model.named_parameters() if not name.startswith("layers.1")]
    with pytest.warns(UserWarning, match="no param group"):
        optimizer = MoQOptimizer(torch.optim.AdamW(first), model, total_steps=12, verbose=False)
    with torch.no_grad():
        model.layers[1].q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite"):
        optimizer.add_param_group({"params": list(model.layers[1].parameters())})
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    assert len(optimizer.num_bits) == 6


def test_a_param_group_whose_blend_would_not_end_is_refused(decoder):
    model = decoder()
    rules = [{"match": "layers.1.*", "blend_steps": 4}]
    config = FALLING | {"rules": rules, "sensitivity": {"rule": "none"}}
    with pytest.warns(UserWarning, match="no param group"):
        adamw = torch.optim.AdamW(model.layers[0].parameters())
        optimizer = MoQOptimizer(adamw, model, config, total_steps=12, verbose=False)
    train_step(model, optimizer, 0)
    before, plan = weights(model), optimizer.schedule().plan()
    with pytest.raises(
        ValueError, match=r"layers\.1\.\w+\.weight .*blend_steps must be at most 3,"
    ):
        optimizer.add_param_group({"params": list(model.layers[1].parameters())})
    assert len(optimizer.param_groups) == 1
    assert optimizer.schedule().plan() == plan
    assert_same(weights(model), before)
    train_step(model, optimizer, 1)
    assert_simulated(optimizer)


def test_a_tied_weight_has_one_master_and_both_places_see_its_value(decoder):
    model = decoder()
    model.lm_head.weight = model.embedding.weight
    optimizer = wrap(model, FALLING | {"rules": [{"match": "lm_head"}]})
    assert "embedding.weight" in optimizer.num_bits
    for step in range(3):
        train_step(model, optimizer, step)
        assert_simulated(optimizer)
        assert torch.equal(model.lm_head.weight, model.embedding.weight)


def test_a_frozen_parameter_is_simulated_and_its_master_stays(decoder):
    model = decoder()
    model.layers[0].requires_grad_(False)
    original = model.layers[0].up_proj.weight.detach().clone()
    optimizer = wrap(model, FALLING, total_steps=5)
    for step in range(5):
        train_step(model, optimizer, step)
        assert_simulated(optimizer)
    assert torch.equal(masters(optimizer)["layers.0.up_proj.weight"], original)
    assert optimizer.num_bits["layers.0.up_proj.weight"] == 4


def test_a_sparse_gradient_is_refused_by_name_and_costs_no_step(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING | {"rules": [{"match": "embedding"}]})
    model.embedding.sparse = True
    loss_of(model, batch(0)).backward()
    with pytest.raises(ValueError, match=r"gradient of embedding\.weight must be dense"):
        optimizer.step()
    assert optimizer.steps == 0
    assert all(master.grad is None for master in masters(optimizer).values())


def test_a_failing_inner_step_leaves_the_model_and_the_groups_usable(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    before, full = weights(model), masters(optimizer)
    loss_of(model, batch(0)).backward()
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.steps == 0
    assert all(master.grad is None for master in full.values())
    assert_same(weights(model), before)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.step()
    assert_simulated(optimizer)


def test_warm_state_of_the_inner_optimizer_is_kept(decoder):
    plain, wrapped = decoder(), decoder()
    inner = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(3):
        train_step(plain, reference, step)
        train_step(wrapped, inner, step)
    optimizer = MoQOptimizer(inner, wrapped, FALLING, total_steps=9, verbose=False)
    optimizer.state_dict()
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    reference.step()
    optimizer.step()
    expected = weights(plain)
    assert_same(masters(optimizer), {name: expected[name] for name in masters(optimizer)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_warm_state_of_a_half_precision_model_is_in_the_dtype_of_the_masters(decoder, dtype):
    """Moments of the parameters' dtype; others (bytes, sums in float32) stay what they are."""
    model = decoder(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    for step in range(2):
        train_step(model, sgd, step)
    warm = {name: sgd.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    own = {
        "codes": torch.arange(12 * 12, dtype=torch.uint8).reshape(12, 12),
        "wide": torch.full((12, 12), 1 / 3),
        "rows": torch.ones(12, dtype=dtype),
    }
    sgd.state[model.layers[0].k_proj.weight] |= own
    before = weights(model)
    optimizer = MoQOptimizer(sgd, model, FALLING, total_steps=9, verbose=False)
    found = optimizer.state[model.layers[0].k_proj.weight]
    assert_same({key: found[key] for key in own}, own)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer.step()
    for name, master in masters(optimizer).items():
        momentum = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert momentum.dtype == master.dtype == torch.float32
        expected = warm[name].float() * 0.5 + 0.25
        torch.testing.assert_close(momentum, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(master.detach(), before[name].float() - 0.5 * expected)
    assert optimizer.state[model.layers[0].norm.weight]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize("fused", [False, True], ids=["host skip", "fused found_inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["in_place", "autograd", "learned"])
def test_an_overflow_step_changes_nothing_not_even_the_schedule(decoder, dtype, fused, form):
    model = decoder(dtype)
    config = FALLING | {"rounding": "nearest" if form == "learned" else "stochastic"}
    if form != "in_place":
        scale = "learned" if form == "learned" else "absmax"
        config |= {"simulate": "autograd", "scale": scale, "master_dtype": "parameter"}
    optimizer = MoQOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused),
        model,
        config,
        total_steps=4,
        verbose=False,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def scaled_step(step: int, overflow: bool) -> None:
        scaler.scale(loss_of(model, batch(step))).backward()
        if overflow:
            dict(model.named_parameters())[spoilt].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def state() -> dict[str, torch.Tensor]:
        names = {p: name for name, p in model.named_parameters()}
        found = {f"{name} of the model": p for p, name in names.items()}
        for p, entry in optimizer.state.items():
            found |= {f"{key} of {names[p]}": v for key, v in entry.items()}
        return {name: value.detach().clone() for name, value in found.items()}

    spoilt = [name for name, _ in model.named_parameters() if "layers.0.q_proj" in name][-1]
    assert spoilt.endswith("absmax") == (form == "learned")
    scaled_step(0, overflow=False)
    assert optimizer.steps == 1
    before, bits, seen = state(), optimizer.num_bits, model(batch(9)).detach()
    assert len(before) > 2 * len(bits)
    scaled_step(1, overflow=True)
    assert scaler.get_scale() == 32.0
    assert (optimizer.steps, optimizer.num_bits) == (1, bits)
    assert_same(state(), before)
    assert torch.equal(model(batch(9)), seen)
    scaled_step(1, overflow=False)
    assert optimizer.steps == 2
    assert optimizer.num_bits != bits
    assert not torch.equal(model(batch(9)), seen)
    if form == "in_place":
        assert_simulated(optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_training_is_the_unscaled_one(decoder, fused):
    scaled, plain = decoder(), decoder()
    optimizers = [
        MoQOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, fused=fused),
            model,
            FALLING,
            total_steps=4,
            verbose=False,
        )
        for model in (scaled, plain)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for step in range(4):
        scaler.scale(loss_of(scaled, batch(step))).backward()
        scaler.unscale_(optimizers[0]) if step % 2 else None
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        train_step(plain, optimizers[1], step)
    for name, value in masters(optimizers[1]).items():
        torch.testing.assert_close(masters(optimizers[0])[name], value, rtol=1e-4, atol=1e-6)
    assert optimizers[0].steps == 4


def test_autocast_trains_float32_weights(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING, total_steps=3)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_simulated(optimizer)
    assert model.layers[0].q_proj.weight.dtype == torch.float32


def test_masters_of_bfloat16_weights_are_float32_unless_told_otherwise(decoder):
    model = decoder(torch.bfloat16)
    assert {m.dtype for m in masters(wrap(model, FALLING)).values()} == {torch.float32}
    optimizer = wrap(decoder(torch.bfloat16), FALLING | {"master_dtype": "parameter"})
    assert {m.dtype for m in masters(optimizer).values()} == {torch.bfloat16}
    train_step(optimizer.model, optimizer, 0)
    assert_simulated(optimizer)


def test_small_learning_rates_move_masters_of_a_bfloat16_model(decoder):
    model = decoder(torch.bfloat16)
    optimizer = wrap(model, FALLING, lr=2e-5)
    before = {name: m.detach().clone() for name, m in masters(optimizer).items()}
    train_step(model, optimizer, 0)
    moved = [(masters(optimizer)[name] != value).float().mean() for name, value in before.items()]
    assert torch.stack(moved).mean() > 0.95


def test_a_weight_used_in_a_graph_that_is_still_open_is_seen_as_changed(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    loss = loss_of(model, batch(0))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_models_see_new_values_without_recompiling(decoder):
    torch._dynamo.reset()  # what other tests compiled of the decoder would count as a recompilation
    model = decoder()
    optimizer = wrap(model, FALLING)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        for step in range(4):
            eager = loss_of(model, batch(step)).item()
            loss = loss_of(compiled, batch(step))
            assert loss.item() == eager
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch._dynamo.config.error_on_recompile = before


def test_ddp_around_the_model_changes_no_name(decoder, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(decoder())
        optimizer = wrap(model, FALLING)
        assert "layers.0.q_proj.weight" in optimizer.num_bits
        for step in range(2):
            train_step(model, optimizer, step)
            assert_simulated(optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_in_which_nothing_is_quantized_is_told_so():
    model = nn.Conv2d(3, 4, 2)
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="no weight is quantized"):
        MoQOptimizer(adamw, model, {"target_bits": 8}, total_steps=12, verbose=False)
