"""MatchSpec, first slice: suites of samples, recorded answers, three graders, and runs that live in a stream.

`suite` and `gsm8k` load what is to be graded, `graders` and `numbers` decide, `run` publishes one `eval.result` per
sample and goes on where it stopped, `results` reads runs back and compares them. No inference, judges, weights,
repeats or HTTP in this slice.
"""
