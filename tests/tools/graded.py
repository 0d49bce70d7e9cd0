"""One recorded answer, judged by the graders of its harness, without a run around it."""

from __future__ import annotations

from mist.tools.matchspec.judging import Judge
from mist.tools.matchspec.models import at_once
from mist.tools.matchspec.results import Result
from mist.tools.matchspec.suite import Harness, Sample, sample_key


def grade(suite: str, harness: Harness, sample: Sample, run: str) -> Result:
    known = at_once(harness)
    assert known is not None, "somebody has to be asked"
    result = Judge(suite, harness, run).at_once(sample, known(sample), sample_key(harness.name, sample), 0, 1)
    assert result is not None, "a grader takes time, or asks somebody"
    return result
