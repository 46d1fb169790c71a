"""Code that a model wrote, tried by tests that it cannot reach.

Two processes, started with nothing but Python itself: judge.py holds the tests and starts program.py, which runs the
code shut off (filter.py). They exchange calls and plain values (wire.py). What the program does to its own process
cannot make it pass: the judge compares, and the judge's exit says the result.
"""
