"""What a machine computes in."""

from __future__ import annotations

import pytest
import torch

from alignctl.errors import MachineError
from alignctl.train import machine


@pytest.mark.parametrize(
    ("where", "dtype", "found"),
    [
        (machine.Machine("cuda", "GPU", True), "auto", torch.bfloat16),
        (machine.Machine("cuda", "GPU", False), "auto", torch.float32),
        (machine.Machine("cuda", "GPU", False), "float16", torch.float16),
        (machine.Machine("cpu", "CPU", False), "auto", torch.float32),
        (machine.Machine("cpu", "CPU", True), "bfloat16", torch.bfloat16),
    ],
)
def test_precision(where: machine.Machine, dtype: str, found: torch.dtype) -> None:
    assert where.precision(dtype) == found


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float16")])
def test_precision_that_the_machine_has_not(kind: str, dtype: str) -> None:
    with pytest.raises(MachineError, match=r"model\.dtype") as error:
        machine.Machine(kind, "an old one", False).precision(dtype)
    assert error.value.exit_code == 4
