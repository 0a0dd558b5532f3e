"""Run checks on the simulated device and write what failed: python -m simulated_cuda LIBRARY FOLDER NAME ..."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from simulated_cuda import device


def main(library: str, folder: str, *names: str) -> None:
    device.load(Path(library))
    from simulated_cuda import inference_checks, training_checks

    checks = inference_checks.CHECKS | training_checks.CHECKS
    for name in names:
        scratch = Path(folder, name)
        scratch.mkdir()
        start, failure = time.process_time(), ""
        try:
            checks[name](scratch)
        except BaseException:
            failure = traceback.format_exc()
        result = {"failure": failure, "seconds": round(time.process_time() - start, 1)}
        Path(folder, f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
