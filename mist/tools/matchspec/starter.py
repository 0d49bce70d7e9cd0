"""`init`: files to begin with. What it writes is valid and runs without a model: the answers are in the data, or are the input."""

from __future__ import annotations

from pathlib import Path

from mist.errors import AlreadyExists, Refused

CONFIG = """\
version: 1

# defaults:                  # of harnesses that do not say
#   concurrency: 4
#   timeout_seconds: 30
#   retries: 0
#   retry_delay_ms: 250

suites:
  - name: first
    description: Replace this by what your system must get right.
    harnesses:
      - evals/first.yml
    tags: [smoke]
    thresholds:
      overall: 1.0
"""

FIRST = """\
version: 1
name: first
dataset: first.jsonl         # one sample per line

# Who answers. `echo` gives the input back; replace it, for example by
#   model: {type: infer, model: auto, url: "http://127.0.0.1:8600"}
#   model: {type: command, command: [./answer.sh], input_via: stdin}
model: {type: echo}

graders:
  - type: contains
    name: mentions
    config:
      case_sensitive: false
"""

FIRST_DATA = """\
{"id": "paris", "input": "The capital of France is Paris.", "expected": "paris", "tags": ["smoke"]}
{"id": "rome", "input": "The capital of Italy is Rome.", "expected": "rome"}
"""

EXAMPLE_SUITE = """\
  - name: examples
    description: Recorded answers, graded as numbers and as JSON.
    harnesses:
      - evals/sums.yml
      - evals/orders.yml
    thresholds:
      overall: 0.6
      shape: 1.0
    statistics:
      min_sample_size: 2
      min_sample_action: warn
"""

SUMS = """\
version: 1
name: sums
dataset: sums.jsonl          # its lines bring their recorded answers: `output`
model: {type: recorded, label: small}
graders:
  - type: numeric            # the first number after the last "A:"
    name: result
    config: {marker: "A:"}
"""

SUMS_DATA = """\
{"id": "1", "input": "What is 2 + 2?", "expected": 4, "output": "Two and two make four.\\nA: 4"}
{"id": "2", "input": "What is 1,000 * 3?", "expected": 3000, "output": "A: $3,000"}
{"id": "3", "input": "What is 7 * 6?", "expected": 42, "output": "That would be 41.\\nA: 41"}
"""

ORDERS = """\
version: 1
name: orders
dataset:
  name: orders
  examples:
    - id: one
      input: "I want two teas."
      expected: tea
      output: '{"item": "tea", "count": 2}'
    - id: two
      input: "A coffee, please."
      expected: coffee
      output: '{"item": "coffee", "count": 1}'
model: {type: recorded, label: small}
graders:
  - type: json_schema
    name: shape
    config:
      schema:
        type: object
        required: [item, count]
        properties:
          count: {type: integer, minimum: 1}
  - type: json_path
    name: item
    config: {path: item}
"""


def init(folder: Path, *, with_examples: bool = False, force: bool = False) -> list[Path]:
    """Write a matchspec.yml and a harness with its data; with more of them, that grade recorded answers. Returns what was
    written. Raises AlreadyExists, before anything is written, when a file is there and `force` does not overwrite it."""
    files = {
        "matchspec.yml": CONFIG + (EXAMPLE_SUITE if with_examples else ""),
        "evals/first.yml": FIRST,
        "evals/first.jsonl": FIRST_DATA,
    }
    if with_examples:
        files |= {"evals/sums.yml": SUMS, "evals/sums.jsonl": SUMS_DATA, "evals/orders.yml": ORDERS}
    there = [name for name in files if (folder / name).exists()]
    if there and not force:
        raise AlreadyExists(f"{folder / there[0]} is there already", hint="--force overwrites it")
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise Refused(f"{folder}: {exc.strerror or exc}") from exc
    return [folder / name for name in files]
