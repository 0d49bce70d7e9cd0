"""MatchSpec: suites of samples, who answers them, graders that judge, and runs that live in a stream.

`load` is the front end: files to checked suites (`specs`, `yaml`, `toml`, `data`, `gsm8k`), with the place of what is wrong in
them (`positions`). `suite` holds the shapes, `graders` decide, `run` asks, judges and publishes one `eval.result` per
sample, and goes on where it stopped. `results` reads runs back.
"""
