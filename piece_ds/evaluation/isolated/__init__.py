"""Run code that a model wrote, against tests that it cannot reach.

Two processes need nothing but Python itself. judge.py holds the tests and starts program.py. program.py runs the code
behind a filter of system calls (filter.py). They exchange calls and plain values (wire.py). The program cannot pass by
anything it does to its own process: the judge compares, and the judge's exit code is the result.
"""
