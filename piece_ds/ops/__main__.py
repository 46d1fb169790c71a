"""`python -m piece_ds.ops`: which provider serves which op."""

from piece_ds.ops.backends import report

if __name__ == "__main__":
    print(report())
