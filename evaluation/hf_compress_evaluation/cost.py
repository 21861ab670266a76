"""What it costs to serve a model: rows a second, memory, energy.

| metric | unit | of |
|---|---|---|
| `throughput`, `throughput_tokens` | rows/s, tokens/s | the calls whose latency was taken, of the largest batch |
| `peak_memory` | bytes | a fresh process that loads the model and runs the largest batch: all of it, libraries too |
| `peak_gpu_memory` | bytes | what torch allocated on the GPU in it |
| `energy_per_1000_rows` | Wh | the machine, as codecarbon tells, while batches are run one after the other |

What cannot be taken is left out, with a log line: nothing here is estimated. (codecarbon itself takes a processor's
rated power where the machine has no energy counter.)
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from hf_compress.facts import Measurement, Setting

from .latency import Call, Latency

logger = logging.getLogger(__name__)

LONGEST = 600.0
"""Seconds that a fresh process may take."""
SECONDS = 10.0
"""How long batches are run for their energy: codecarbon reads counters once a second."""
COUNTRY = "USA"
"""codecarbon's offline tracker asks for one; it decides emissions, which are not recorded, and not energy."""
_TRACKER: dict[str, Any] = {
    "country_iso_code": COUNTRY,
    "measure_power_secs": 1,
    "tracking_mode": "machine",
    "save_to_file": False,
    "save_to_api": False,
    "log_level": "critical",
}
"""Given in full where a user's configuration of codecarbon could send or write something."""


def throughput(subject: str, variant: str, taken: Latency, *, provider: str) -> tuple[Measurement, Measurement]:
    """Rows and tokens (padding included) a second, from the mean of a latency's calls, back to back."""
    how: dict[str, Setting] = {
        "threads": taken.threads,
        "batch": taken.batch,
        "length": taken.length,
        "provider": provider,
        "runs": taken.runs,
        "warmup": taken.warmup,
    }
    rows = taken.batch / taken.mean
    return (
        Measurement(subject=subject, variant=variant, metric="throughput", value=rows, unit="rows/s", how=how),
        Measurement(
            subject=subject,
            variant=variant,
            metric="throughput_tokens",
            value=rows * taken.length,
            unit="tokens/s",
            how=how,
        ),
    )


def peak_memory(
    subject: str, variant: str, source: str | Path, *, device: str, how: Mapping[str, Setting]
) -> tuple[Measurement, ...]:
    """The most memory of a fresh process that loads a model and runs one batch; torch's part on a GPU as well.

    Args:
        subject, variant: for the record; "torch", or the name of an exported variant.
        source: folder or hub id of a torch model; folder of an exported variant, opened with ONNX Runtime alone.
        device: "cpu" or "cuda".
        how: `batch`, `length`, `threads`, and what else is to be recorded.
    """
    kind = "torch" if variant == "torch" else "onnx"
    sizes = {name: how[name] for name in ("batch", "length", "threads")}
    wanted = json.dumps({"kind": kind, "source": str(source), "device": device, **sizes})
    if (found := _told(wanted)) is None:
        logger.warning("%s %s: peak memory is not measured", subject, variant)
        return ()
    names = {"resident": "peak_memory", "allocated": "peak_gpu_memory"}
    conditions = dict(how) | {"of": "a fresh process, libraries included"}
    return tuple(
        Measurement(subject=subject, variant=variant, metric=names[key], value=value, unit="bytes", how=conditions)
        for key, value in found.items()
        if value is not None
    )


def _told(wanted: str) -> dict[str, int | None] | None:
    """What a process of `serving_process` says; None, and a warning, if it does not end well."""
    command = [sys.executable, "-m", "hf_compress_evaluation.serving_process"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command, input=wanted, capture_output=True, text=True, timeout=LONGEST, env=environment, check=True
        )
        told = json.loads(done.stdout)
        return {name: told[name] for name in ("resident", "allocated")}
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [""])[-1]
        logger.warning("the process that was to serve ended with code %d: %s", error.returncode, last)
    except (subprocess.TimeoutExpired, ValueError) as error:
        logger.warning("the process that was to serve did not end well: %s", error)
    return None


def measures_energy() -> bool:
    """Whether codecarbon is installed: pip install 'hf-compress[energy]'."""
    return util.find_spec("codecarbon") is not None


def energy(
    subject: str, variant: str, call: Call, *, how: Mapping[str, Setting], seconds: float = SECONDS
) -> tuple[Measurement, ...]:
    """Watt-hours of 1,000 rows, from batches that are run for some seconds. Needs codecarbon.

    Args:
        subject, variant: for the record.
        call: runs one batch.
        how: its conditions, `batch` among them.
        seconds: for how long, at least.
    """
    from codecarbon import OfflineEmissionsTracker

    batch = how["batch"]
    assert isinstance(batch, int)  # of a latency
    tracker, calls = OfflineEmissionsTracker(**_TRACKER), 0
    tracker.start()
    try:
        end = time.monotonic() + seconds
        while not calls or time.monotonic() < end:
            call()
            calls += 1
    finally:
        tracker.stop()
    told = getattr(tracker, "final_emissions_data", None)  # its methods log what fails inside them, and do not raise
    kilowatt_hours = float(getattr(told, "energy_consumed", math.nan))
    if not 0 < kilowatt_hours < math.inf:
        logger.warning("%s %s: energy is not measured: codecarbon gave %s kWh", subject, variant, kilowatt_hours)
        return ()
    taken = {
        "codecarbon": metadata.version("codecarbon"),
        "tracking_mode": _TRACKER["tracking_mode"],
        "rows": calls * batch,
    }
    return (
        Measurement(
            subject=subject,
            variant=variant,
            metric="energy_per_1000_rows",
            value=1000 * kilowatt_hours * 1000 / (calls * batch),
            unit="Wh",
            how={**how, **taken},
        ),
    )
