"""mma.h: products are right in the order of every card's lanes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.fibers.cases import EkProduct, product_case
from tests.kernels.fibers.harness import fiber_kernel, in_all_orders

ORDERS = (80, 10, 11, 12)


def halves(numbers: NDArray[np.float32], *, is_f16: bool) -> NDArray[np.uint16]:
    dtype = torch.float16 if is_f16 else torch.bfloat16
    return torch.from_numpy(numbers).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("is_f16", [False, True], ids=["bf16", "f16"])
def test_products_are_right(order: int, is_f16: bool) -> None:
    rng = np.random.default_rng(order)
    a, b = rng.integers(-9, 10, (2, 16, 16)).astype(np.float32)  # exact, and so are their sums
    x, y = halves(a, is_f16=is_f16), halves(b, is_f16=is_f16)
    kernel = fiber_kernel(product_case(is_f16=is_f16, order=order))

    def launch(seed: int) -> NDArray[np.float32]:
        c = np.full((2, 16, 16), np.nan, np.float32)
        kernel(EkProduct(x.ctypes.data, y.ctypes.data, c.ctypes.data), (1,), seed=seed)
        return c

    first, second = in_all_orders(launch)
    np.testing.assert_array_equal(first, a @ b)
    np.testing.assert_array_equal(second, 2 * (a @ b))
