"""The arithmetic against a float64 oracle, and bit equality at both ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keepshot.blending.blend import (
    CHUNK_ELEMENTS,
    blend,
    blend_,
    realised_lambda,
    same_bits,
)
from keepshot.blending.rules import as_rule, check_lambda
from keepshot.errors import ConfigError, ModelError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Half the distance between neighbours, relative: what one rounding to nearest may cost.
HALF_ULP = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


def tensors(seed: int, *shape: int, relative: float = 0.05) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, base + 0.02 * relative * torch.randn(shape, generator=generator).double()


def oracle(base: Tensor, tuned: Tensor, lam: float) -> np.ndarray:
    origin, end = base.double().numpy(), tuned.double().numpy()
    return origin + lam * (end - origin)


@pytest.mark.parametrize("dtype", DTYPES)
@given(lam=st.floats(-0.5, 1.5), seed=st.integers(0, 1000), relative=st.floats(1e-4, 3.0))
@settings(max_examples=40, deadline=None)
def test_blend_is_the_float64_oracle_within_one_rounding(
    dtype: torch.dtype, lam: float, seed: int, relative: float
) -> None:
    base, tuned = (end.to(dtype) for end in tensors(seed, 7, 11, relative=relative))
    out = blend(base, tuned, lam)
    assert out.dtype == dtype
    expected = oracle(base, tuned, lam)
    # float32 arithmetic on numbers as large as the ends and the delta, then one rounding.
    largest = (base.double().abs() + 3 * (tuned.double() - base.double()).abs()).numpy()
    arithmetic = HALF_ULP[torch.float64 if dtype == torch.float64 else torch.float32]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tolerance = HALF_ULP[dtype] * np.abs(expected) * 1.001 + 3 * arithmetic * largest + smallest
    assert (np.abs(out.double().numpy() - expected) <= tolerance).all()


@pytest.mark.parametrize("lam", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("relative", [0.01, 1.0])
def test_other_orders_of_the_same_sum_lie_two_float32_steps_away(
    lam: float, relative: float
) -> None:
    """What mergekit's `linear` does: (1 - lam) * base + lam * tuned, over the weights' sum.

    Each of its four operations rounds at the size of the ends, and so do two of our three: no two
    orders give the same bits. Steps are those of float32 at the larger end, for the sum of two
    weights of opposite sign can be as small as it likes.
    """
    base, tuned = (end.float() for end in tensors(3, 400, 500, relative=relative))
    weights = torch.tensor([1 - lam, lam])
    other = torch.zeros_like(base)
    for end, weight in zip((base, tuned), weights, strict=True):
        other.addcmul_(end, weight)
    other /= weights.sum()
    step = np.spacing(np.maximum(np.abs(base.numpy()), np.abs(tuned.numpy()))).astype(np.float64)
    ours = blend(base, tuned, lam)
    errors = [(out.double().numpy() - oracle(base, tuned, lam)) / step for out in (ours, other)]
    assert np.abs(errors[0] - errors[1]).max() <= 2.0 + 1e-6
    assert np.abs(errors[0]).max() <= 1.5
    assert np.abs(errors[1]).max() <= 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_lambda_0_and_1_are_bit_equal_to_both_ends(dtype: torch.dtype) -> None:
    base, tuned = (end.to(dtype) for end in tensors(0, 64, 65, relative=2.0))
    base[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    tuned[0, :4] = torch.tensor([-0.0, -0.0, 1.0, 0.0])
    assert same_bits(blend(base, tuned, 0), base)
    assert same_bits(blend(base, tuned, 1), tuned)
    assert blend(base, tuned, 1).data_ptr() != tuned.data_ptr()


def test_negative_zero_would_be_lost_by_arithmetic_alone() -> None:
    base, tuned = torch.tensor([-0.0]), torch.tensor([1.0])
    assert not same_bits(base + 0.0 * (tuned - base), base)
    assert same_bits(blend(base, tuned, 0.0), base)


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype", "wider"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_two_dtypes_keep_their_own_at_the_ends_and_the_wider_between(
    base_dtype: torch.dtype, tuned_dtype: torch.dtype, wider: torch.dtype
) -> None:
    base, tuned = tensors(1, 40)
    base, tuned = base.to(base_dtype), tuned.to(tuned_dtype)
    assert same_bits(blend(base, tuned, 0.0), base)
    assert same_bits(blend(base, tuned, 1.0), tuned)
    middle = blend(base, tuned, 0.5)
    assert middle.dtype == wider
    np.testing.assert_allclose(middle.double(), oracle(base, tuned, 0.5), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_layout_or_position(dtype: torch.dtype) -> None:
    base, tuned = (end.to(dtype) for end in tensors(2, 1000, 33))
    whole = blend(base, tuned, 0.3)
    assert same_bits(blend(base.T, tuned.T, 0.3).T.contiguous(), whole)
    rows = [blend(base[row], tuned[row], 0.3) for row in range(1000)]
    assert same_bits(torch.stack(rows), whole)


def test_a_bfloat16_tensor_longer_than_a_chunk() -> None:
    base, tuned = (end.bfloat16() for end in tensors(3, CHUNK_ELEMENTS + 5))
    halves = [blend(b, t, 0.7) for b, t in zip(base.split(999), tuned.split(999), strict=True)]
    assert same_bits(blend(base, tuned, 0.7), torch.cat(halves))


def test_empty_and_scalar_tensors() -> None:
    assert blend(torch.empty(0, 3), torch.empty(0, 3), 0.5).shape == (0, 3)
    assert blend(torch.tensor(1.0), torch.tensor(3.0), 0.25).item() == 1.5


def test_integers_must_be_equal() -> None:
    same = torch.arange(5)
    assert torch.equal(blend(same, same.clone(), 0.5), same)
    with pytest.raises(ModelError, match=r"'position_ids' \(torch.int64\) differs.*dequantised"):
        blend(same, same + 1, 0.5, name="position_ids")
    with pytest.raises(ModelError, match=r"'w': base is torch.int64, tuned is torch.float32"):
        blend(same, same.float(), 0.5, name="w")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_nan_and_infinity_are_refused_by_name(dtype: torch.dtype, value: float, kind: str) -> None:
    base, tuned = (end.to(dtype) for end in tensors(4, 100, 50))
    broken = tuned.clone()
    broken[63, 17] = value
    with pytest.raises(ModelError, match=f"tuned tensor 'layers.3.w' holds {kind}"):
        blend(base, broken, 0.5, name="layers.3.w")
    with pytest.raises(ModelError, match=f"base tensor 'layers.3.w' holds {kind}"):
        blend(broken, tuned, 1.0, name="layers.3.w")


def test_overflow_beyond_the_tuned_model_is_refused() -> None:
    base, tuned = torch.zeros(3).half(), torch.full((3,), 60000.0).half()
    with pytest.raises(ModelError, match="blend at lambda 2 of tensor 'w' holds infinity"):
        blend(base, tuned, 2.0, name="w")


def test_other_shapes_are_refused_with_both_shapes() -> None:
    with pytest.raises(ModelError, match=r"'emb'.*\(3, 4\).*\(5, 4\)"):
        blend(torch.zeros(3, 4), torch.zeros(5, 4), 0.5, name="emb")


def test_unsupported_float_is_refused() -> None:
    odd = torch.zeros(2).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="float8_e4m3fn, which cannot be blended"):
        blend(odd, odd, 0.5)


@pytest.mark.parametrize("lam", [0, 0.0, 0.4, 1, 1.0])
def test_lambda_within_range_has_no_note(lam: float) -> None:
    assert check_lambda(lam) is None


@pytest.mark.parametrize(
    ("lam", "side"), [(1.5, "beyond the tuned"), (-0.1, "away from the tuned")]
)
def test_lambda_out_of_range_is_noted(lam: float, side: str) -> None:
    note = check_lambda(lam)
    assert note is not None
    assert side in note
    assert f"{lam:g}" in note


@pytest.mark.parametrize("lam", [math.nan, math.inf, "0.4", True, None])
def test_lambda_that_is_no_number_is_refused(lam: object) -> None:
    with pytest.raises(ConfigError, match="is not a number"):
        check_lambda(lam)  # type: ignore[arg-type]


def test_a_rule_may_be_a_number_or_a_function_of_the_name() -> None:
    assert as_rule(0.4)("anything") == 0.4
    rule = as_rule(lambda name: 1.0 if "norm" in name else 0.2)
    assert (rule("a.norm"), rule("a.proj")) == (1.0, 0.2)


def test_realised_lambda_is_the_lambda_where_nothing_is_rounded() -> None:
    base, tuned = (end.float() for end in tensors(5, 200, 100))
    for lam in (-0.5, 0.0, 0.1, 0.65, 1.0, 1.3):
        realised = realised_lambda(blend(base, tuned, lam), base, tuned)
        assert realised == pytest.approx(lam, abs=1e-6)
    assert realised_lambda(base, base, base) is None


def test_realised_lambda_shows_the_staircase_of_bfloat16() -> None:
    base, tuned = (end.bfloat16() for end in tensors(6, 1000, 500, relative=0.005))
    realised = realised_lambda(blend(base, tuned, 0.1), base, tuned)
    assert realised is not None
    assert realised < 0.05
    out = torch.empty_like(base, dtype=torch.float32)
    blend_(out, base, tuned, 0.1)
    assert realised_lambda(out, base, tuned) == pytest.approx(0.1, abs=1e-5)
