"""Peak memory of a call, where the system reports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odvae.utils.profiling import profile_call


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process's memory, which is the CPU's figure")
def test_the_peak_of_a_call_is_measured_and_not_that_of_an_earlier_one() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux resets the peak")
    profile_call(lambda: np.ones(2**25).sum())  # 256 MiB
    total, usage = profile_call(lambda: np.ones(2**23).sum())  # 64 MiB
    assert total == 2**23 and usage.growth is not None and 60 < usage.growth < 130 and usage.seconds > 0


@pytest.mark.parametrize("method", ["write_text", "read_text"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the process's memory is not read")
def test_where_the_system_reports_no_memory_the_time_is_measured(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(Path, method)

    def refused(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.parts[:2] == ("/", "proc"):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, method, refused)
    result, usage = profile_call(lambda: 7)
    assert (result, usage.before, usage.peak, usage.growth) == (7, None, None, None) and usage.seconds >= 0
