import pytest
import torch

from moq._C import Error, read_safetensors, write_safetensors

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_comes_back_as_it_was_written(tmp_path, dtype):
    values = torch.arange(6).view(2, 3).to(dtype)
    tensors = {"whole": values, "turned": values.t(), "number": values[0, 1], "none": values[:0]}

    write_safetensors(str(tmp_path / "file"), list(tensors.items()), {"format": "pt"})
    found = read_safetensors(str(tmp_path / "file"))

    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].tolist() == tensor.tolist()


def test_a_dtype_that_files_cannot_hold_is_refused_by_the_name_of_the_tensor(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(Error, match="rotation: expected a dtype .* got ComplexFloat"):
        write_safetensors(str(path), [("rotation", torch.zeros(2, dtype=torch.complex64))], {})
    assert not path.exists()


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(Error, match="a: expected every tensor once"):
        write_safetensors(str(tmp_path / "file"), [("a", torch.zeros(2)), ("a", torch.ones(2))], {})
