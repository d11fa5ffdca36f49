"""A whole fleet under random faults, by seed: real processes, a real Redis, a real S3 server, and a verdict.

`PYTHONPATH=tests python -m soak --seed 7 --seconds 60` prints the faults as they happen and what was found wrong.
"""
