"""Python imports this at its start where PYTHONPATH has this directory: each optimizer step takes TEST_STEP_S seconds
longer, and rank 0 adds a line to the file TEST_STEP_LOG for each, so that steps made twice can be counted."""

import os
import time
from pathlib import Path

from harness.io import faults

strike = faults.fault_point


def fault_point(name: str) -> None:
    strike(name)
    if name == "step":
        if os.environ.get("RANK") == "0":
            with Path(os.environ["TEST_STEP_LOG"]).open("a") as log:
                log.write("step\n")
        time.sleep(float(os.environ["TEST_STEP_S"]))


faults.fault_point = fault_point
