"""What moq.AdamW and its operator take, and what they refuse before anything has changed."""

import copy

import pytest
import torch
from tiny_decoder import with_gradients
from torch import nn

import moq

FACTORS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "amsgrad must be False, got True"),
        ({"foreach": True}, "foreach must be None, got True"),
        ({"differentiable": True}, "differentiable must be False, got True"),
        ({"fused": False}, "fused must not be False"),
    ],
)
def test_other_forms_of_adamw_are_refused(options, message):
    with pytest.raises(ValueError, match=f"AdamW: {message}"):
        moq.AdamW(with_gradients(torch.ones(3)), **options)
    optimizer = moq.AdamW(with_gradients(torch.ones(3)))
    with pytest.raises(ValueError, match=f"AdamW: {message}"):
        optimizer.add_param_group({"params": with_gradients(torch.ones(3))} | options)


def test_a_state_of_amsgrad_is_refused():
    own = with_gradients(torch.ones(3))
    state = torch.optim.AdamW(own, amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad must be False"):
        moq.AdamW(own).load_state_dict(state)


def test_sparse_gradients_are_refused(device):
    embedding = nn.Embedding(4, 3, sparse=True, device=device)
    optimizer = moq.AdamW(embedding.parameters())
    embedding(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(
        ValueError, match=r"gradients must be dense, got torch.sparse_coo for .*4, "
    ):
        optimizer.step()


def assert_refused(error, message, groups, change=lambda optimizer: None, begun=False) -> None:
    """A step with a harmless param group before the others changes nothing at all."""
    first = with_gradients(torch.ones(5))
    optimizer = moq.AdamW([{"params": first}, *groups])
    if begun:
        optimizer.step()
    change(optimizer)
    before = copy.deepcopy([optimizer.state_dict(), optimizer.param_groups])
    with pytest.raises(error, match=f"AdamW: {message}"):
        optimizer.step()
    after = [optimizer.state_dict(), optimizer.param_groups]
    assert repr(after) == repr(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_dtypes_are_refused(device, dtype):
    weights = with_gradients(torch.ones(3, dtype=dtype, device=device))
    message = (
        f"parameters must be float32, float16 or bfloat16, got {dtype} for one .*3.: use torch"
    )
    assert_refused(TypeError, message, [{"params": weights}])


def test_gradients_of_other_dtypes_are_refused(device):
    (half,) = with_gradients(torch.ones(3, dtype=torch.bfloat16, device=device))
    half.grad_dtype = None
    half.grad = torch.ones(3, device=device)
    message = "gradients must be torch.bfloat16, got torch.float32 for a torch.bfloat16 .*3.: cast"
    assert_refused(TypeError, message, [{"params": [half]}])


@pytest.mark.parametrize(("size", "stride"), [((4, 3), (6, 1)), ((4,), (0,))], ids=str)
def test_a_parameter_with_gaps_or_overlaps_is_refused(device, size, stride):
    weight = nn.Parameter(torch.ones(24, device=device).as_strided(size, stride))
    weight.grad = torch.ones(size, device=device)
    message = r"parameters must fill their memory without gaps .* strides .*contiguous\(\)"
    assert_refused(ValueError, message, [{"params": [weight]}])


def test_a_parameter_without_memory_is_refused():
    weights = with_gradients(torch.ones(3, device="meta"))
    assert_refused(ValueError, "parameters must be on a CPU or a CUDA", [{"params": weights}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"amsgrad": True}, "amsgrad must be False, got True"),
        ({"differentiable": True}, "differentiable must be False, got True"),
        ({"decoupled_weight_decay": False}, "decoupled_weight_decay must be True, got False"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    ],
    ids=str,
)
def test_what_is_not_possible_is_refused_in_a_group_and_set_later(changed, message):
    weights = with_gradients(torch.ones(3))
    with pytest.raises(ValueError, match=f"AdamW: {message}"):
        moq.AdamW([{"params": weights} | changed])
    groups = [{"params": weights}]
    assert_refused(ValueError, message, groups, lambda o: o.param_groups[1].update(changed))


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(3).half(), "moments must be torch.float32 .*, got torch.float16 on cpu for"),
        (torch.zeros(3, device="meta"), "moments must be .* on cpu .* on meta for one of .*3"),
    ],
    ids=["dtype", "device"],
)
def test_moments_of_a_parameter_as_it_was_are_refused(moment, message):
    weights = with_gradients(torch.ones(3))

    def replace(optimizer):
        optimizer.state[weights[0]].update(exp_avg=moment, exp_avg_sq=moment)

    assert_refused(TypeError, message, [{"params": weights}], replace, begun=True)


def test_moments_of_another_shape_are_refused():
    optimizers = [moq.AdamW(with_gradients(torch.ones(size))) for size in (3, 4)]
    for optimizer in optimizers:
        optimizer.step()
    before = repr(optimizers[0].state_dict())
    with pytest.raises(ValueError, match=r"exp_avg must have .* shape \[3\], got \[4\]: load"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert repr(optimizers[0].state_dict()) == before


def test_a_model_of_another_dtype_goes_on_as_the_error_says():
    layer = nn.Linear(3, 2)
    optimizer = moq.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    layer.bfloat16()
    with pytest.raises(TypeError, match=r"load_state_dict\(state_dict\(\)\) makes them so"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[layer.weight]["step"] == 2


def test_a_parameter_given_twice_is_refused():
    (weight,) = with_gradients(torch.ones(3))
    optimizer = moq.AdamW(with_gradients(torch.ones(2)))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="must have each parameter once, got 2 of which 1 are"),
    ):
        optimizer.add_param_group({"params": [weight, weight]})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_another_optimizer_is_refused():
    weights = with_gradients(torch.ones(3))
    sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    sgd.step()
    optimizer = moq.AdamW(weights)
    with pytest.raises(ValueError, match="param groups must have .*, got one without betas, eps"):
        optimizer.load_state_dict(sgd.state_dict())
    state = sgd.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match="state must have .*, got one of momentum_buffer: load"):
        optimizer.load_state_dict(state)
    assert not optimizer.state


# ------------------------------------------------------------------------------ the operator itself


def arguments(**changed):
    values = {
        "parameters": [torch.ones(4)],
        "gradients": [torch.ones(4)],
        "exp_avgs": [torch.zeros(4)],
        "exp_avg_sqs": [torch.zeros(4)],
        "steps": [torch.zeros(())],
    } | changed
    lists = [values.pop(name) for name in list(values)[:5]]
    return lists, FACTORS | values


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gradients": []}, ValueError, "must be one a parameter, got 0 for 1"),
        ({"gradients": [torch.ones(3)]}, ValueError, r"gradients must be \[4\], got \[3\]"),
        ({"gradients": [torch.ones(4).double()]}, TypeError, "gradients must be float32"),
        ({"exp_avgs": [torch.ones(4).half()]}, TypeError, "moments must be float32, got float16"),
        ({"exp_avgs": [torch.ones(8)[::2]]}, ValueError, "must have their parameter's strides"),
        ({"steps": [torch.zeros((), dtype=torch.long)]}, TypeError, "steps must be float32"),
        ({"steps": [torch.zeros(2)]}, ValueError, "steps must have one element"),
        ({"found_inf": torch.zeros(2)}, ValueError, "found_inf must have one element"),
        ({"lr_tensor": torch.ones(1).half()}, TypeError, "lr_tensor must be float32"),
        ({"beta2": 1.0}, ValueError, r"betas must lie in \[0, 1\), got 1"),
    ],
    ids=str,
)
def test_arguments_of_the_operator_are_checked(changed, error, message):
    lists, factors = arguments(**changed)
    with pytest.raises(error, match=f"foreach_adamw: .*{message}"):
        torch.ops.moq.foreach_adamw(*lists, **factors)


def test_a_low_precision_parameter_takes_no_wider_gradient():
    half = [torch.ones(4).bfloat16()]
    lists, factors = arguments(parameters=half, exp_avgs=half, exp_avg_sqs=half)
    with pytest.raises(TypeError, match="bfloat16 parameter must have its dtype, got float32"):
        torch.ops.moq.foreach_adamw(*lists, **factors)


def test_strides_of_a_single_element_mean_nothing(device):
    column = torch.empty_strided((8, 1), (1, 8), device=device).fill_(1.0)
    lists = [[column], *([torch.ones(8, 1, device=device)] for _ in "123")]
    torch.ops.moq.foreach_adamw(*lists, [torch.zeros((), device=device)], **FACTORS)
    assert (column < 1.0).all()


def test_memory_that_would_be_written_twice_is_refused(device):
    memory = torch.ones(8, device=device)

    def lists(**changed):
        kinds = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "steps")
        shapes = [(4,), (4,), (4,), (4,), ()]
        values = {
            k: [torch.zeros(s, device=device) for _ in "ab"]
            for k, s in zip(kinds, shapes, strict=True)
        }
        return (values | changed).values()

    for changed in (
        {"parameters": [memory[:4], memory[3:7]]},
        {"steps": [memory[0], memory[0]]},
        {"exp_avg_sqs": [memory[:4], memory[2:6]]},
    ):
        with pytest.raises(ValueError, match="must not share memory, got those of tensors 0 and 1"):
            torch.ops.moq.foreach_adamw(*lists(**changed), **FACTORS)
    torch.ops.moq.foreach_adamw(*lists(parameters=[memory[:4], memory[4:]]), **FACTORS)


def test_autograd_sees_the_writes():
    lists, factors = arguments(parameters=[torch.ones(4, requires_grad=True)])
    with pytest.raises(ValueError, match="parameters must not require a gradient, got tensor 0"):
        torch.ops.moq.foreach_adamw(*lists, **factors)
    loss = lists[0][0].square().sum()
    with torch.no_grad():
        torch.ops.moq.foreach_adamw(*lists, **factors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
