"""Print which provider serves which op: `python -m piece_ds.ops`."""

from piece_ds.ops.backends import report

if __name__ == "__main__":
    print(report())
