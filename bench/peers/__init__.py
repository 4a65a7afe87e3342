"""Other people's servers of the same model, each with its whole configuration in its own file beside this one.

The files are run by `.venv-peers` (make bench-peers), whose pins must not meet ours, and read their orders from the
environment: BENCH_PORT (and _2, _3), BENCH_MODEL, BENCH_DIR, BENCH_CACHE, BENCH_BODY. They import nothing of ours.
"""
