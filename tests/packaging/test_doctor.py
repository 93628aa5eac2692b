"""`moq doctor` compares what the extension was built for with what it finds."""

import json

import pytest
import torch

from moq import _C, cli


def findings(capsys) -> dict[str, dict]:
    lines = capsys.readouterr().out.splitlines()
    return {finding["subject"]: finding for finding in map(json.loads, lines)}


def test_this_installation_is_what_it_was_built_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whatever machine this is
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert cli.main(["doctor", "--json"]) == 0
    found = findings(capsys)
    assert len(found) == len(lines)
    built = _C.build_info()
    assert found["torch"]["found"] == f"built for {built['torch']}, found {torch.__version__}"
    assert found["CPU kernels"]["found"].startswith(f"instruction set {built['cpu_isa']} ")


@pytest.mark.parametrize(
    ("info", "subject", "remedy"),
    [
        ({"torch": "1.2.3"}, "torch", "pip install torch==1.2.3"),
        ({"cuda_architectures": "100"}, "CUDA kernels", "MOQ_CUDA_ARCHITECTURES='90a' make build"),
        ({"cuda_architectures": None}, "CUDA kernels", "MOQ_CUDA=on make build"),
    ],
)
def test_a_mismatch_is_status_1_and_names_the_remedy(monkeypatch, capsys, info, subject, remedy):
    real = _C.build_info()
    monkeypatch.setattr(_C, "build_info", lambda: real | info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda_architectures" in info)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    assert cli.main(["doctor", "--json"]) == 1
    assert remedy in findings(capsys)[subject]["remedy"]
    cli.main(["doctor"])
    assert "BAD " + subject in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["doctor", "--json"]) == 1
    assert findings(capsys)["transformers"]["remedy"] == "pip install transformers"
