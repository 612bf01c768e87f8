"""Predictions are what one computes by hand from counts and rates."""

import pytest
import torch

from layersync_kernels.analysis import CARDS, GpuStep, Kernel, find_card, predict
from layersync_kernels.errors import UserError

H100 = CARDS["h100"]


def test_each_kernel_takes_the_longer_of_its_two_times():
    card = H100.with_rates(2.0, 500.0)
    step = GpuStep(
        {
            Kernel("forward", "gemm", "aten::mm", 10**9, 10**12, torch.bfloat16): 3,  # 0.5 ms of memory, 2 of products
            Kernel("forward", "gemm", "aten::bmm", 8 * 10**9, 10**12, torch.bfloat16): 1,  # 4 and 2
            Kernel("backward", "other", "triton", 10**9): 2,  # 0.5
        }
    )
    prediction = predict(step, card)
    assert prediction.ms == pytest.approx(6 + 4 + 1)
    assert (prediction.matmul_ms, prediction.memory_ms) == pytest.approx((6, 5))
    assert prediction.group_ms == pytest.approx({"gemm": 10, "attention": 0, "ours": 0, "other": 1})
    assert prediction.binds == "matmul"
    assert predict(step * 2 - step, card).ms == pytest.approx(11)


def test_fp32_has_a_rate_of_its_own():
    def time(dtype):
        return predict(GpuStep({Kernel("forward", "gemm", "aten::mm", 0, 10**12, dtype): 1}), H100).ms

    assert time(torch.float32) > 5 * time(torch.bfloat16)
    with pytest.raises(ValueError, match=r"no matmul rate of NVIDIA H100 80GB HBM3 is known for torch.float64"):
        time(torch.float64)


def test_cards_by_name():
    assert find_card("H100") is H100
    with pytest.raises(UserError, match=r"no card is named 'h900'; known: h100, a100, h200, b200"):
        find_card("h900")
    assert "read from a card" in H100.source
    assert all("data sheet" in card.source for card in CARDS.values())
    assert H100.with_rates() is H100
    assert H100.with_rates(2.0).source.startswith("bandwidth as given; the rest: read from a card")
    assert H100.with_rates(2.0, 3.0).source == "bandwidth and matmul rate as given"
    with pytest.raises(ValueError, match=r"matmul=0: expected a rate above 0"):
        H100.with_rates(teraflops=0)
