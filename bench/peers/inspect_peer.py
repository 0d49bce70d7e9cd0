"""Inspect AI grading recorded answers, for bench/matchspec.py; runs in a virtual environment of its own.

The task's solver puts the recorded answer where a model's would stand, so that no model is called; the scorer is Inspect's
own numeric match at the end of the text. The log is Inspect's own format, written as it writes it.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import match
from inspect_ai.solver import Generate, TaskState, solver


@solver
def recorded():  # type: ignore[no-untyped-def]
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output = ModelOutput.from_content("recorded", state.metadata["output"])
        return state

    return solve


def main(path: str) -> None:
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    samples = [Sample(id=r["id"], input=r["input"], target=r["target"], metadata={"output": r["output"]}) for r in rows]
    task = Task(dataset=MemoryDataset(samples), solver=recorded(), scorer=match(location="end", numeric=True))
    with tempfile.TemporaryDirectory() as logs:
        began, cpu = time.perf_counter(), time.process_time()
        (log,) = eval(
            task, model="mockllm/model", display="none", log_dir=logs, max_samples=64, log_level="error",
            score_display=False, log_realtime=False,
        )  # fmt: skip
        took, used = time.perf_counter() - began, time.process_time() - cpu
    assert log.status == "success", log.error
    accuracy = log.results.scores[0].metrics["accuracy"].value
    print(json.dumps({
        "samples": len(rows), "s": took, "cpu_s": used, "passed": round(accuracy * len(rows)),
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


main(sys.argv[1])
