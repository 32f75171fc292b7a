"""Linear layers with prepacked weights give the results of plain layers."""

import json

import pytest
import torch
from torch import nn

from lightning_softprompt.backbones.kernels import prepacked_linear


def make_layers():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 80), nn.Tanh(), nn.Linear(80, 16, bias=False)).requires_grad_(False)
    layers.get_output_embeddings = lambda: None
    return layers


def output_and_gradient(layers, rows):
    leaf = rows.clone().requires_grad_()
    out = layers(leaf)
    out.sin().sum().backward()
    return out.detach(), leaf.grad


def test_outputs_and_gradients_equal_those_of_plain_layers():
    plain, packed = make_layers(), make_layers()
    assert prepacked_linear.prepack(packed, "prepacked", 48)
    rows = torch.randn(2, 5, 48)
    results = [output_and_gradient(layers, rows) for layers in (plain, packed)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert packed[0].forward.packed is not None


def test_other_precisions_run_as_before():
    packed = make_layers().to(torch.bfloat16)
    prepacked_linear.prepack(packed, "prepacked", 48)
    assert packed(torch.randn(3, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert packed[0].forward.packed is None


def test_products_in_bfloat16_are_near_and_everything_else_stays_float32():
    plain, packed = make_layers(), make_layers()
    if not prepacked_linear.is_supported(torch.bfloat16):  # a CPU with AVX2 alone
        with pytest.raises(ValueError, match=r"linear_backend=bf16 requires .* Set --backbone.linear_backend auto"):
            prepacked_linear.prepack(packed, "bf16", 48)
        return
    assert prepacked_linear.prepack(packed, "bf16", 48)
    rows = torch.randn(2, 5, 48)
    results = [output_and_gradient(layers, rows) for layers in (plain, packed)]
    assert results[1][0].dtype == results[1][1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.02)
    assert not torch.equal(results[1][0], results[0][0])
    with prepacked_linear.plain_products():
        assert torch.equal(packed(rows), results[0][0])


@pytest.mark.parametrize("linear_backend", ["prepacked", "bf16"])
def test_products_that_the_cpu_lacks_are_refused_before_any_layer_changes(linear_backend, monkeypatch):
    def refuse(weight):
        raise RuntimeError("mkldnn_reorder_linear_weight: the path needs instructions")

    monkeypatch.setattr(prepacked_linear, "pack_weight", refuse)
    layers = make_layers()
    prepacked_linear.is_supported.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"backbone.linear_backend={linear_backend} requires oneDNN products"):
            prepacked_linear.prepack(layers, linear_backend, 48)
        assert "forward" not in vars(layers[0])
        assert prepacked_linear.gain() == 0
    finally:
        prepacked_linear.is_supported.cache_clear()


def test_plain_and_narrow_models_are_not_changed():
    assert not prepacked_linear.prepack(make_layers(), "plain", 1024)
    assert not prepacked_linear.prepack(make_layers(), "auto", 48)


def test_a_measurement_is_remembered(tmp_path, monkeypatch):
    file = tmp_path / "compute.json"
    monkeypatch.setattr(prepacked_linear, "gain", lambda: 2.0)
    assert prepacked_linear.is_faster_here(file)
    monkeypatch.setattr(prepacked_linear, "gain", lambda: 0.5)
    assert prepacked_linear.is_faster_here(file)
    assert list(json.loads(file.read_text()).values()) == [2.0]
    assert [p.name for p in tmp_path.iterdir()] == ["compute.json"]


def test_a_damaged_or_unwritable_cache_costs_a_measurement_only(tmp_path, monkeypatch):
    monkeypatch.setattr(prepacked_linear, "gain", lambda: 2.0)
    damaged = tmp_path / "compute.json"
    damaged.write_text("[not json")
    assert prepacked_linear.is_faster_here(damaged)
    assert list(json.loads(damaged.read_text()).values()) == [2.0]
    (tmp_path / "file").write_text("")
    assert prepacked_linear.is_faster_here(tmp_path / "file" / "compute.json")


def test_the_gain_is_measured():
    assert prepacked_linear.gain() > 0
