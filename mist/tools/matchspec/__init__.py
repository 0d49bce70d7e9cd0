"""MatchSpec: suites of samples, who answers them, graders, and runs that live in a stream.

load, data, specs     suites, harnesses and data from files          grading, graders    an output to a verdict
suite                 what a suite is, and what none may be           models, asking      who answers, and how it is asked
run, recorded         running, and going on from the stream           results, manifest   what a run leaves, read back
derive                fork, replay, rescore; what is left; history    reducers            one score out of repeats
"""
