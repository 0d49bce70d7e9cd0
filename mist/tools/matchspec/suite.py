"""A suite: harnesses (samples, who answers, graders) and the gate they must pass. Values and their checks.

Everything is checked before anything runs (`suite_of`): unknown graders, empty expectations, doubled ids, no samples,
no graders, no answers are errors, never a pass. The digest covers all that decides a run's results: samples, models,
graders with their code, prompts, repeats, the seed. How it is run (concurrency, timeouts, retries, limits) and how it
is judged afterwards (the gate) are not part of it.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mist.errors import InvalidArgument, NotFound, Refused
from mist.tools.matchspec.grading import Asking, Grader, Pure, code_of, describe
from mist.tools.matchspec.positions import nearest
from mist.tools.matchspec.reducers import reducer

LINE_BYTES_MAX = 10 * 1024 * 1024
CONCURRENCY_MAX = 1024
EPOCHS_MAX = 1000
EXCERPT = 60
CLUSTER_CHARS_MAX = 200
"""Of the value that a sample's metadata has for the field that clusters."""


class Sample(Struct, frozen=True, gc=False):
    """`graders` are the names of those that judge it; empty = all of its harness. `output` is a recorded answer that came
    with it (read by a `Recorded` model without `answers`)."""

    id: str
    input: str
    expected: str
    graders: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    output: str | None = None


class Samples(Protocol):
    """A list of samples, or anything with a length that gives the same samples, in the same order, every time it is
    iterated: a file that is read line by line need not be in memory."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


class Recorded(Struct, frozen=True, kw_only=True, tag_field="type", tag="recorded"):
    """Answers that are there already: `answers[sample id]`, or each sample's own `output` (None). A missing one is an
    error result, never a pass. They are texts, or `asking.Answer` where costs, times and trace ids are known."""

    label: str
    answers: Mapping[str, Any] | None = None


class Infer(Struct, frozen=True, kw_only=True, tag_field="type", tag="infer"):
    """Asked through `infer.request` envelopes: over a broker (`BROKER?stream=infer-requests&answers=infer`), over HTTP
    (`http(s)://…`, to `/mist`), or, with no `url`, the callable that the program hands in; without one, over the run's
    own broker."""

    model: str = "auto"
    provider: str = ""
    params: dict[str, Any] = {}
    url: str = ""
    label: str = ""


class Http(Struct, frozen=True, kw_only=True, tag_field="type", tag="http"):
    """Any HTTP endpoint. `{{input}}`, `{{system}}` and `{{id}}` in the texts of `request_template` are filled in;
    `response_path` finds the text in the JSON answer. The key is read from the environment, never from a file."""

    endpoint: str
    method: str = "POST"
    headers: dict[str, str] = {}
    request_template: Any = None
    response_path: str = ""
    api_key_env: str = ""
    label: str = ""


class Command(Struct, frozen=True, kw_only=True, tag_field="type", tag="command"):
    """A program, without a shell; its standard output is the answer. The input comes on stdin, as the last argument, or
    in the variable INPUT."""

    command: tuple[str, ...]
    input_via: Literal["stdin", "arg", "env"] = "stdin"
    label: str = ""


class Echo(Struct, frozen=True, kw_only=True, tag_field="type", tag="echo"):
    """The input comes back."""

    label: str = "echo"


class Noop(Struct, frozen=True, kw_only=True, tag_field="type", tag="noop"):
    """Answers with the empty text: what a suite scores on nothing."""

    label: str = "noop"


class Python(Struct, frozen=True, kw_only=True, tag_field="type", tag="python"):
    """`module:callable`, given the input, giving the answer as text (a coroutine function is awaited, others run in a
    thread)."""

    target: str
    label: str = ""


ModelSpec = Recorded | Infer | Http | Command | Echo | Noop | Python


def label_of(model: ModelSpec) -> str:
    """What results call the model."""
    if model.label:
        return model.label
    match model:
        case Infer():
            return model.model
        case Http():
            return model.endpoint
        case Command():
            return " ".join(model.command)[:EXCERPT]
        case Python():
            return model.target
    return ""


class Harness(Struct, frozen=True, kw_only=True):
    """Samples, who answers them, and who judges. `template` makes the prompt of a sample's input (`{{input}}`); `system`
    goes before it where the model has such a thing. `retries` repeat a call that failed with an error that says it may be
    repeated, after `retry_delay_s` doubling, with jitter. `epochs`: how often each sample is asked; `reducer` makes one
    score of them. `pass_score`: a sample passes when its (weighted) score reaches it; None = when every grader passed."""

    name: str
    samples: Samples
    model: ModelSpec
    graders: tuple[Grader, ...]
    description: str = ""
    system: str = ""
    template: str = ""
    concurrency: int = 4
    timeout_s: float = 30.0
    retries: int = 0
    retry_delay_s: float = 0.25
    epochs: int = 1
    reducer: str = "mean"
    pass_score: float | None = None
    data_digest: str = ""
    """Filled in by `suite_of`."""

    @property
    def label(self) -> str:
        return label_of(self.model)

    @property
    def total(self) -> int:
        """Results it makes."""
        return len(self.samples) * self.epochs

    @property
    def weights(self) -> tuple[float, ...] | None:
        weights = [g.weight for g in self.graders if g.weight is not None]
        return tuple(weights) if weights else None

    def prompt(self, sample: Sample) -> str:
        return self.template.replace("{{input}}", sample.input) if self.template else sample.input


class Gate(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a run must reach. `overall` and `per_grader` are thresholds in 0..1 for the `metric`: the share of samples that
    passed, or the mean score; `overall` None: 1 for what nothing else names. `use_lower_bound` compares the lower end of the interval at `confidence`. `on_error`: an
    error counts as failed, or is left out as long as no more than `errors_max_share` are. Ceilings: None = none; a cost
    that is not known is above every ceiling.

    `cluster`: a field of the samples' metadata, such as the document a question is about. Samples with the same value depend
    on one another: intervals, standard errors and comparisons then take whole clusters for what was drawn. Every sample must
    have it, and its value goes into the results: it is part of the suite's digest, unlike all else here."""

    overall: float | None = None
    per_grader: dict[str, float] = {}
    metric: Literal["pass_rate", "mean_score"] = "pass_rate"
    use_lower_bound: bool = False
    confidence: float = 0.95
    min_sample_size: int = 0
    min_sample_action: Literal["warn", "fail"] = "warn"
    on_error: Literal["fail", "exclude"] = "fail"
    errors_max_share: float = 0.05
    cost_usd_max: float | None = None
    """Of the whole run."""
    latency_ms_max: float | None = None
    """Of the 95th percentile."""
    cluster: str = ""


class Digests(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """SHA-256 in hexadecimal over the parts, so that a difference can be named."""

    data: str = ""
    models: str = ""
    graders: str = ""
    code: str = ""
    """Of the graders' source."""
    settings: str = ""
    """Prompts, repeats, reducers, the seed, what clusters."""


class Suite(Struct, frozen=True, kw_only=True):
    """Checked, by `suite_of`. `seed` is passed on to models that take one."""

    name: str
    harnesses: tuple[Harness, ...]
    gate: Gate = Gate()
    description: str = ""
    tags: tuple[str, ...] = ()
    seed: int | None = None
    digest: str = ""
    digests: Digests = Digests()

    @property
    def models(self) -> list[str]:
        """The labels of those who answer, each once, in order."""
        return list(dict.fromkeys(h.label for h in self.harnesses))

    @property
    def total(self) -> int:
        """Results a complete run has."""
        return sum(h.total for h in self.harnesses)

    def harness(self, name: str) -> Harness:
        """Raises NotFound."""
        for h in self.harnesses:
            if h.name == name:
                return h
        raise NotFound(
            f"suite {self.name} has no harness {name!r}", hint=f"it has {', '.join(h.name for h in self.harnesses)}"
        )


def suite_of(
    name: str,
    harnesses: Sequence[Harness],
    *,
    where: str,
    gate: Gate | None = None,
    description: str = "",
    tags: Sequence[str] = (),
    seed: int | None = None,
) -> Suite:
    """A checked suite; every harness's samples are read once. Raises InvalidArgument, naming the place, for whatever would
    let a run pass without having judged anything."""
    if not name:
        raise InvalidArgument(f"{where}: the suite has no name")
    if not harnesses:
        raise InvalidArgument(f"{where}: the suite has no harnesses, nothing would be judged")
    names = [h.name for h in harnesses]
    if not all(names) or len(set(names)) != len(names):
        raise InvalidArgument(f"{where}: two harnesses are called the same, or one has no name")
    gate = gate or Gate()
    _check_gate(gate, {g.name for h in harnesses for g in h.graders}, where)
    checked = tuple(_checked(h, gate.cluster, where) for h in harnesses)
    settings: list[Any] = [
        name, seed, [[h.name, h.system, h.template, h.epochs, h.reducer, h.pass_score] for h in checked],
    ]  # fmt: skip
    digests = Digests(
        data=_sha([[h.name, h.data_digest] for h in checked]),
        models=_sha([[h.name, model_settings(h.model)] for h in checked]),
        graders=_sha([[h.name, [describe(g) for g in h.graders]] for h in checked]),
        code=_sha([[h.name, [code_of(g) for g in h.graders]] for h in checked]),
        settings=_sha([*settings, gate.cluster] if gate.cluster else settings),
    )
    return Suite(
        name=name,
        harnesses=checked,
        gate=gate,
        description=description,
        tags=tuple(tags),
        seed=seed,
        digest=_sha(digests),
        digests=digests,
    )


def recorded_suite(
    name: str,
    samples: Samples,
    answers: Mapping[str, Mapping[str, str]],
    graders: Sequence[Grader],
    *,
    where: str,
    gate: Gate | None = None,
) -> Suite:
    """The suite of recorded answers (`answers[model][sample id]`): one harness per model, called like it."""
    if not len(samples):
        raise InvalidArgument(f"{where}: the suite has no samples, nothing would be judged")
    if not answers:
        raise InvalidArgument(f"{where}: there are no recorded answers, nothing would be judged")
    harnesses = [
        Harness(name=model, samples=samples, model=Recorded(label=model, answers=found), graders=tuple(graders))
        for model, found in answers.items()
    ]
    return suite_of(name, harnesses, where=where, gate=gate)


def model_settings(model: ModelSpec) -> dict[str, Any]:
    """What decides an answer, as plain values. Recorded answers are data, not settings."""
    if isinstance(model, Recorded):
        return {"type": "recorded", "label": model.label}
    settings: dict[str, Any] = msgspec.to_builtins(model)
    return settings


def sample_key(harness: str, sample: Sample) -> str:
    """The stable key of a sample: the first 32 hexadecimal digits of the SHA-256 over the JSON array `[harness, id, input,
    expected, graders, metadata]` (compact, map keys sorted, UTF-8). The same sample has the same key in every run, whatever
    stands before it; a sample that was changed is another one."""
    return _key([harness, sample.id, sample.input, sample.expected, sample.graders, sample.metadata])


_canonical = msgspec.json.Encoder(order="deterministic").encode


def _key(parts: list[Any]) -> str:
    return hashlib.sha256(_canonical(parts)).hexdigest()[:32]


def _sha(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _check_gate(gate: Gate, graders: set[str], where: str) -> None:
    thresholds = {
        "overall": 1.0 if gate.overall is None else gate.overall,
        **gate.per_grader,
        "errors_max_share": gate.errors_max_share,
    }
    for name, value in thresholds.items():
        if not 0.0 <= value <= 1.0:
            raise InvalidArgument(f"{where}: gate: {name} = {value} does not lie in 0..1")
    if not 0.0 < gate.confidence < 1.0:
        raise InvalidArgument(f"{where}: gate: a confidence of {gate.confidence} does not lie between 0 and 1")
    unknown = sorted(set(gate.per_grader) - graders)
    if unknown:
        raise InvalidArgument(
            f"{where}: gate: no grader is called {unknown[0]!r}", hint=f"the suite has {', '.join(sorted(graders))}"
        )
    for name, ceiling in (("cost_usd_max", gate.cost_usd_max), ("latency_ms_max", gate.latency_ms_max)):
        if ceiling is not None and not ceiling >= 0:
            raise InvalidArgument(f"{where}: gate: {name} = {ceiling} is no ceiling")


def cluster_of(sample: Sample, field: str) -> str:
    """The sample's cluster: the text of its metadata's `field`. Raises InvalidArgument when it has none, as a misspelt field
    would otherwise make every interval too narrow."""
    found = sample.metadata.get(field)
    if found is None or found == "":
        raise InvalidArgument(
            f"no {field!r} in the metadata, by which the gate clusters",
            hint=nearest(field, sample.metadata) if sample.metadata else "this sample has none",
        )
    text = found if isinstance(found, str) else _canonical(found).decode()
    if len(text) > CLUSTER_CHARS_MAX:
        raise InvalidArgument(f"{field!r} in the metadata is longer than {CLUSTER_CHARS_MAX} characters")
    return text


def _checked(h: Harness, cluster: str, where: str) -> Harness:
    at = where if h.name == h.label else f"{where}: harness {h.name}"
    if not h.graders:
        raise InvalidArgument(f"{at}: the suite has no graders, nothing would be judged")
    if not len(h.samples):
        raise InvalidArgument(f"{at}: the suite has no samples, nothing would be judged")
    names = [g.name for g in h.graders]
    if len(set(names)) != len(names):
        raise InvalidArgument(f"{at}: two graders are called the same", hint="give them a `name`")
    for g in h.graders:
        if not isinstance(g, Pure | Asking):
            raise InvalidArgument(f"{at}: grader {g.name} neither grades nor asks")
    weights = h.weights
    if weights is not None and (len(weights) != len(h.graders) or not sum(weights) > 0 or min(weights) < 0):
        raise InvalidArgument(f"{at}: weights: all graders have one or none, none is negative, one is above 0")
    if not (
        1 <= h.concurrency <= CONCURRENCY_MAX
        and 1 <= h.epochs <= EPOCHS_MAX
        and h.retries >= 0
        and h.retry_delay_s >= 0
        and 0 < h.timeout_s < math.inf
    ):
        raise InvalidArgument(
            f"{at}: concurrency, epochs, retries, retry_delay_s or timeout_s cannot be right",
            hint=f"concurrency 1 to {CONCURRENCY_MAX}, epochs 1 to {EPOCHS_MAX}, retries 0 or more, a timeout above 0",
        )
    if h.pass_score is not None and not 0.0 < h.pass_score <= 1.0:
        raise InvalidArgument(f"{at}: pass_score = {h.pass_score} does not lie in 0..1 (0 would pass everything)")
    if not label_of(h.model):
        raise InvalidArgument(f"{at}: the model has no name")
    reducer(h.reducer, h.epochs, at)
    return replace(h, data_digest=_read(h, names, cluster, at))


def _read(h: Harness, names: list[str], cluster: str, at: str) -> str:
    """One pass over the samples: every check, and the digest of the data (answers included)."""
    digest = hashlib.sha256()
    judged: dict[tuple[str, ...], list[Grader]] = {(): list(h.graders)}
    recorded = h.model if isinstance(h.model, Recorded) else None
    seen = _Seen()
    count = answered = 0
    for sample in h.samples:
        count += 1
        seen.add(sample.id)
        graders = judged.get(sample.graders)
        if graders is None:
            for wanted in sample.graders:
                if wanted not in names:
                    raise InvalidArgument(
                        f"{at}: sample {sample.id} asks for the grader {wanted!r}, which the suite does not have",
                        hint=f"it has {', '.join(names)}",
                    )
            graders = judged[sample.graders] = [g for g in h.graders if g.name in sample.graders]
            if h.weights is not None and not any(g.weight for g in graders):
                raise InvalidArgument(f"{at}: sample {sample.id} is judged by graders of weight 0 only")
        for g in graders:
            try:
                g.check(sample.expected)
            except InvalidArgument as exc:
                raise InvalidArgument(f"{at}: sample {sample.id}: {exc.message}", hint=exc.hint) from exc
        if cluster:
            try:
                cluster_of(sample, cluster)
            except InvalidArgument as exc:
                raise InvalidArgument(
                    f"{at}: sample {sample.id}: {exc.message}", hint=exc.hint, meta={"key": "statistics"}
                ) from exc
        output = sample.output
        if recorded is not None:
            output = recorded.answers.get(sample.id) if recorded.answers is not None else output
            answered += output is not None
        parts = [sample.id, sample.input, sample.expected, sample.graders, sample.tags, sample.metadata, output]
        try:
            digest.update(_canonical(parts))
        except (UnicodeEncodeError, TypeError, msgspec.EncodeError) as exc:
            raise InvalidArgument(f"{at}: sample {sample.id!r} has no JSON form: {exc}") from exc
    if seen.doubled():
        _refuse_doubled(h.samples, at)
    if count != len(h.samples):
        raise InvalidArgument(f"{at}: {len(h.samples)} samples were announced, there are {count}")
    if recorded is not None:
        if not answered:
            raise InvalidArgument(f"{at}: there are no recorded answers, nothing would be judged")
        if recorded.answers is not None and len(recorded.answers) > answered:
            known = {s.id for s in h.samples}
            strange = set(recorded.answers) - known
            raise InvalidArgument(
                f"{at}: {len(strange)} answers of {h.label} belong to no sample, for example {min(strange)!r}"
            )
    return digest.hexdigest()


class _Seen:
    """Whether a text occurred twice, in 8 bytes a text: 64-bit hashes. It may suspect wrongly (once in ten million
    for a million texts), so who is told looks again; it never overlooks one."""

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(64)]

    def add(self, text: str) -> None:
        value = hash(text)
        self._buckets[value & 63].append(value)

    def doubled(self) -> bool:
        return any(len(set(b)) != len(b) for b in self._buckets)


def _refuse_doubled(samples: Samples, at: str) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InvalidArgument(f"{at}: sample id {sample.id!r} occurs twice")
        seen.add(sample.id)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file. Raises InvalidArgument naming the line."""
    for number, line in lines(path):
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise InvalidArgument(f"{path}:{number}: not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise InvalidArgument(f"{path}:{number}: not a JSON object")
        yield number, row


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of the lines that are not empty."""
    try:
        with path.open("rb") as f:
            number = 0
            while line := f.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    raise InvalidArgument(f"{path}:{number}: longer than {LINE_BYTES_MAX} bytes")
                if not line.isspace():
                    yield number, line
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"{path}: not UTF-8 text") from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc
